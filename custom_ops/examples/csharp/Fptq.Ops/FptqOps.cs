using System;
using System.IO;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;

namespace Fptq.Ops
{
    /// <summary>Registers the kernels of the domain "fptq" with an onnxruntime session.</summary>
    public static class SessionOptionsExtensions
    {
        private const string FileName = "libfptq_ops.so";

        /// <summary>Where the native library of this package lies in the application's folder.</summary>
        /// <exception cref="FileNotFoundException">It is neither beside the application nor under runtimes/.</exception>
        public static string LibraryPath
        {
            get
            {
                string rid = "linux-" + RuntimeInformation.ProcessArchitecture.ToString().ToLowerInvariant();
                string portable = Path.Combine(AppContext.BaseDirectory, "runtimes", rid, "native", FileName);
                // An application published for one runtime identifier has its native files beside it.
                string published = Path.Combine(AppContext.BaseDirectory, FileName);
                if (File.Exists(portable)) return portable;
                if (File.Exists(published)) return published;
                throw new FileNotFoundException(
                    FileName + " is missing from the application's folder. Build the package Fptq.Ops with the library.",
                    portable);
            }
        }

        /// <summary>Adds W4A8MatMul and the other ops of the library, for sessions created with these options.</summary>
        public static SessionOptions RegisterFptqOps(this SessionOptions options)
        {
            options.RegisterCustomOpLibrary(LibraryPath);
            return options;
        }
    }
}
