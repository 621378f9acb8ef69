using System;
using System.Collections.Generic;
using System.Diagnostics;
using Fptq.Ops;
using Microsoft.ML.OnnxRuntime;

namespace Generate
{
    /// <summary>Greedy text generation: token ids in, token ids out (README.md shows how to go from text and back).</summary>
    internal static class Program
    {
        private static int Main(string[] given)
        {
            Arguments arguments;
            try
            {
                arguments = Arguments.Parse(given);
            }
            catch (Exception error) when (error is ArgumentException || error is FormatException)
            {
                Console.Error.WriteLine("error: " + error.Message + "\n" + Arguments.Usage);
                return 2;
            }
            try
            {
                Run(arguments);
                return 0;
            }
            catch (Exception error)
            {
                Console.Error.WriteLine("error: " + error.Message);
                return 1;
            }
        }

        private static void Run(Arguments arguments)
        {
            using (var options = new SessionOptions { IntraOpNumThreads = arguments.Threads })
            {
                if (arguments.Cuda) options.AppendExecutionProvider_CUDA(0);
                if (arguments.Library) options.RegisterFptqOps();
                using (var session = new InferenceSession(arguments.Model, options))
                using (var decoder = new Decoder(session, arguments))
                {
                    var made = new List<long>();
                    var clock = Stopwatch.StartNew();
                    long token = decoder.Next(arguments.Prompt);
                    TimeSpan first = clock.Elapsed;
                    made.Add(token);
                    while (made.Count < arguments.Tokens && token != arguments.Stop)
                    {
                        token = decoder.Next(new[] { token });
                        made.Add(token);
                    }
                    double rest = (clock.Elapsed - first).TotalSeconds;
                    Console.WriteLine(string.Join(" ", made));
                    Console.Error.WriteLine(
                        "first token after {0:F3} s, then {1:F1} tokens/s", first.TotalSeconds, (made.Count - 1) / rest);
                }
            }
        }
    }
}
