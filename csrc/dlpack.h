// The part of DLPack 1.x that we use: it gives a tensor's address, type and strides without an allocation. The layouts
// are those of the published standard (dmlc/dlpack, include/dlpack/dlpack.h).
#pragma once

#include <cstdint>

namespace lucid {

struct DLDevice {
  int32_t type;  // 1 is the CPU, 2 CUDA, 10 ROCm
  int32_t index;
  bool operator==(const DLDevice&) const = default;
};

struct DLDataType {
  uint8_t code;  // 2 float, 4 bfloat16, 5 complex
  uint8_t bits;
  uint16_t lanes;
  bool operator==(const DLDataType&) const = default;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace lucid
