using System;
using System.Linq;

namespace Generate
{
    /// <summary>The command line, the same as that of the C++ example.</summary>
    internal sealed class Arguments
    {
        internal const string Usage =
            "Usage: Generate MODEL.onnx PROMPT_IDS [options]\n" +
            "  PROMPT_IDS       token ids of the prompt, such as 504,3575,282\n" +
            "  --tokens N       most tokens to generate (64)\n" +
            "  --stop ID        token that ends the text (none)\n" +
            "  --in-place       append to the cache in one buffer (models of onnxruntime-genai: GroupQueryAttention)\n" +
            "  --head-size N    size of a head, where the model declares it by a name (onnxruntime-genai does)\n" +
            "  --threads N      threads of an operator (onnxruntime's choice)\n" +
            "  --cuda           run on the GPU\n" +
            "  --no-library     do not register the op library: the ops run through their function bodies";

        internal string Model = "";
        internal long[] Prompt = new long[0];
        internal int Tokens = 64;
        internal long Stop = -1;
        internal long HeadSize = -1;
        internal int Threads;
        internal bool InPlace;
        internal bool Cuda;
        internal bool Library = true;

        /// <exception cref="ArgumentException">The arguments are not as in <see cref="Usage"/>.</exception>
        internal static Arguments Parse(string[] given)
        {
            if (given.Length < 2) throw new ArgumentException("a model and a prompt are needed");
            var result = new Arguments { Model = given[0], Prompt = given[1].Split(',').Select(long.Parse).ToArray() };
            for (int i = 2; i < given.Length; ++i)
            {
                switch (given[i])
                {
                    case "--in-place": result.InPlace = true; break;
                    case "--cuda": result.Cuda = true; break;
                    case "--no-library": result.Library = false; break;
                    case "--tokens": result.Tokens = int.Parse(Value(given, ++i)); break;
                    case "--stop": result.Stop = long.Parse(Value(given, ++i)); break;
                    case "--head-size": result.HeadSize = long.Parse(Value(given, ++i)); break;
                    case "--threads": result.Threads = int.Parse(Value(given, ++i)); break;
                    default: throw new ArgumentException("unknown option " + given[i]);
                }
            }
            return result;
        }

        private static string Value(string[] given, int index)
        {
            if (index == given.Length) throw new ArgumentException(given[index - 1] + " needs a value");
            return given[index];
        }
    }
}
