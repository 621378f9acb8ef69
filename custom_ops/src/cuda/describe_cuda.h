// What the CUDA kernels would do on this machine.
#ifndef FPTQ_CUDA_DESCRIBE_CUDA_H_
#define FPTQ_CUDA_DESCRIBE_CUDA_H_

#include <string>

#include "fptq/fptq_ops.h"

namespace fptq::cuda {

/// JSON object of FptqDescribeLibrary's "cuda". Throws nothing: a missing driver is part of the description.
std::string DescribeDevices();

/// Name of the kernel for a product on device `product.cuda_device`. Throws CudaError.
std::string DescribeProduct(const FptqProduct& product);

}  // namespace fptq::cuda

#endif  // FPTQ_CUDA_DESCRIBE_CUDA_H_
