using System;
using System.Collections.Generic;
using System.Linq;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Generate
{
    /// <summary>One sequence and its key/value cache, which never leaves the device.</summary>
    /// <remarks>
    /// In place, past and present are one buffer per layer that attention appends to; else the present outputs of a run
    /// are the past inputs of the next.
    /// </remarks>
    internal sealed class Decoder : IDisposable
    {
        private const string Past = "past_key_values";
        private const string Present = "present";

        private readonly InferenceSession session;
        private readonly RunOptions runOptions = new RunOptions();
        private readonly OrtMemoryInfo device;
        private readonly OrtAllocator allocator;  // outlives the first caches, which it frees
        private readonly List<string> names;
        private readonly bool inPlace;
        private List<OrtValue> cache;
        private long length;

        internal Decoder(InferenceSession session, Arguments arguments)
        {
            this.session = session;
            inPlace = arguments.InPlace;
            device = arguments.Cuda
                ? new OrtMemoryInfo("Cuda", OrtAllocatorType.DeviceAllocator, 0, OrtMemType.Default)
                : OrtMemoryInfo.DefaultInstance;
            names = session.InputMetadata.Keys.Where(name => name.StartsWith(Past)).ToList();
            if (names.Count == 0) throw new ArgumentException("the model has no key/value cache (" + Past + ".N.key)");
            long capacity = arguments.InPlace ? arguments.Prompt.Length + arguments.Tokens : 0;
            allocator = new OrtAllocator(session, device);
            cache = names.Select(name => NewCache(session.InputMetadata[name], capacity, arguments.HeadSize)).ToList();
        }

        /// <summary>Runs tokens after those of earlier calls; returns the most likely next token.</summary>
        internal long Next(long[] tokens)
        {
            long[] shape = { 1, tokens.Length };
            long[] mask = Enumerable.Repeat(1L, (int)length + tokens.Length).ToArray();
            long[] positions = Enumerable.Range(0, tokens.Length).Select(i => length + i).ToArray();
            using (var binding = session.CreateIoBinding())
            using (var idsValue = OrtValue.CreateTensorValueFromMemory(tokens, shape))
            using (var maskValue = OrtValue.CreateTensorValueFromMemory(mask, new long[] { 1, mask.Length }))
            using (var positionsValue = OrtValue.CreateTensorValueFromMemory(positions, shape))
            {
                binding.BindInput("input_ids", idsValue);
                binding.BindInput("attention_mask", maskValue);
                if (session.InputMetadata.ContainsKey("position_ids")) binding.BindInput("position_ids", positionsValue);
                binding.BindOutputToDevice("logits", OrtMemoryInfo.DefaultInstance);
                for (int i = 0; i < names.Count; ++i)
                {
                    binding.BindInput(names[i], cache[i]);
                    string present = Present + names[i].Substring(Past.Length);
                    if (inPlace) binding.BindOutput(present, cache[i]);
                    else binding.BindOutputToDevice(present, device);
                }
                List<OrtValue> outputs = session.RunWithBoundResults(runOptions, binding).ToList();
                length += tokens.Length;
                long next = MostLikely(outputs[0]);
                outputs[0].Dispose();
                // In place these are new handles of the same buffers.
                foreach (OrtValue old in cache) old.Dispose();
                cache = outputs.Skip(1).ToList();
                return next;
            }
        }

        public void Dispose()
        {
            foreach (OrtValue value in cache) value.Dispose();
            allocator.Dispose();
            runOptions.Dispose();
        }

        private OrtValue NewCache(NodeMetadata input, long capacity, long headSize)
        {
            int[] declared = input.Dimensions;  // [batch, heads, past, head size], -1 where it is named
            long size = declared[3] > 0 ? declared[3] : headSize;
            if (size <= 0) throw new ArgumentException("the model does not declare its head size: give --head-size");
            return OrtValue.CreateAllocatedTensorValue(
                allocator, input.ElementDataType, new long[] { 1, declared[1], capacity, size });
        }

        /// <summary>Index of the largest of the last row of logits [1, S, vocabulary], the first among equals.</summary>
        private static long MostLikely(OrtValue logits)
        {
            OrtTensorTypeAndShapeInfo info = logits.GetTensorTypeAndShape();
            int vocabulary = (int)info.Shape[2];
            int start = (int)info.ElementCount - vocabulary;
            int best = 0;
            if (info.ElementDataType == TensorElementType.Float16)
            {
                ReadOnlySpan<Float16> row = logits.GetTensorDataAsSpan<Float16>().Slice(start);
                for (int i = 1; i < vocabulary; ++i)
                    if (row[i].ToFloat() > row[best].ToFloat()) best = i;
            }
            else
            {
                ReadOnlySpan<float> row = logits.GetTensorDataAsSpan<float>().Slice(start);
                for (int i = 1; i < vocabulary; ++i)
                    if (row[i] > row[best]) best = i;
            }
            return best;
        }
    }
}
