#pragma once
/**
 * The functions of ONNX Runtime's C interface that we call, by their place in its table. There is no header to compile
 * against: neither npm nor a distribution ships one. The table only ever grows at its end, so a place once given stays.
 *
 * Counted in include/onnxruntime/core/session/onnxruntime_c_api.h of ONNX Runtime 1.24; onnxruntime_c_api.cc there pins
 * where each version ended: ReleaseCustomOpDomain is 101 (version 1), ReleaseModelMetadata 118, ReleaseAvailableProviders
 * 126, SetGlobalSpinControl 149, ReleaseArenaCfg 157, CreateSessionFromArrayWithPrepackedWeightsContainer 169.
 */
#include <cstddef>
#include <cstdint>

namespace pi2 {

// DO NOT CHANGE THESE VALUES: a wrong one calls another function.
enum class OnnxruntimeSlot : size_t {
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kCreateSession = 7,
  kRun = 9,
  kCreateSessionOptions = 10,
  kDisableMemPattern = 17,
  kDisableCpuMemArena = 19,
  kSetSessionGraphOptimizationLevel = 23,
  kSetIntraOpNumThreads = 24,
  kSetInterOpNumThreads = 25,
  kSessionGetInputCount = 30,
  kSessionGetOutputCount = 31,
  kSessionGetInputTypeInfo = 33,
  kSessionGetOutputTypeInfo = 34,
  kSessionGetInputName = 36,
  kSessionGetOutputName = 37,
  kCreateTensorWithDataAsOrtValue = 49,
  kCastTypeInfoToTensorInfo = 55,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kCreateCpuMemoryInfo = 69,
  kAllocatorFree = 76,
  kGetAllocatorWithDefaultOptions = 78,
  kReleaseEnv = 92,
  kReleaseStatus = 93,
  kReleaseMemoryInfo = 94,
  kReleaseSession = 95,
  kReleaseValue = 96,
  kReleaseTypeInfo = 98,
  kReleaseSessionOptions = 100,
  kAddSessionConfigEntry = 130,
  kAddInitializer = 150,
  kAddExternalInitializers = 210,
  kRegisterExecutionProviderLibrary = 301,
  kGetEpDevices = 303,
  kSessionOptionsAppendExecutionProviderV2 = 304,
  kEpDeviceEpName = 312,
};

/** The version of the table that has all of them: ONNX Runtime 1.22, the first with execution providers as plug-ins. */
constexpr uint32_t kOnnxruntimeApiVersion = 22;

/** Values of the interface's enums that we pass or expect. */
enum class OnnxruntimeValue : int {
  kLogFatal = 4,         // ORT_LOGGING_LEVEL_FATAL: failures come as a status, with the same words
  kOptimizeAll = 99,     // ORT_ENABLE_ALL
  kFloat = 1,            // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
  kDeviceAllocator = 0,  // OrtDeviceAllocator
  kDefaultMemory = 0,    // OrtMemTypeDefault
};

}  // namespace pi2
