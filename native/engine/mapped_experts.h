#pragma once
#include <memory>

#include "native/base/thread_pool.h"
#include "native/engine/experts.h"
#include "native/storage/mapped_file.h"

namespace pi2 {

/**
 * A baseline, as other engines run models that do not fit: neurons.bin is mapped, the kernel's page cache decides what is in
 * memory, and every gate, up and down of every neuron is computed, in place. Same bits as ResidentExperts: a neuron that
 * does not fire has the factor zero, and sums are cut as everywhere (neurons.h).
 */
class MappedExperts : public Experts {
 public:
  static size_t scratch_bytes(const EngineConfig& config);
  /** Maps the file, compares its checksums and checks that every expert lies inside an extent. */
  static Status open(const EngineConfig& config, const Kernels& kernels, ThreadPool& pool, uint8_t* scratch,
                     std::unique_ptr<Experts>* result);

  /** Fails once a page of the file could not be read. */
  Status run(const ExpertJob& job) override;

 private:
  MappedExperts() = default;
  /** Lays the buffers below over `scratch` (null: only measures); returns the bytes they take. */
  size_t carve(const EngineConfig& config, uint8_t* scratch);
  Rows rows_from(const uint8_t* bundles, size_t matrix, size_t neuron) const;
  void multiply_matrix(const ExpertJob& job, const uint8_t* bundles, size_t matrix, size_t first, size_t count,
                       size_t thread, float* out);
  void add_chunk(const ExpertJob& job, const uint8_t* bundles, size_t chunk, size_t part, size_t thread);
  void add_down(const ExpertJob& job, const uint8_t* bundles, size_t first, size_t count, const float* values, size_t thread,
                float* sums);
  void add_parts(const ExpertJob& job);

  const EngineConfig* config_ = nullptr;
  const Kernels* kernels_ = nullptr;
  ThreadPool* pool_ = nullptr;
  MappedFile file_;
  float* tiles_ = nullptr;      // (thread, 3, batch, chunk): gates, ups, products of rows that are a unit apart
  float* factors_ = nullptr;    // (thread, chunk, batch): what several tokens take of each neuron
  float* part_sums_ = nullptr;  // (part, batch, padded hidden)
  uint64_t fired_[kParts] = {};
};

}  // namespace pi2
