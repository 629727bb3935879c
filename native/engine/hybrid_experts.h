#pragma once
#include <memory>

#include "native/base/thread_pool.h"
#include "native/engine/experts.h"
#include "native/npu/dense_unit.h"

namespace pi2 {

/** What the dense unit did since open. */
struct UnitCounters {
  /** Jobs that it took a part of; of them, those that another graph had to be made active for. */
  uint64_t jobs = 0;
  uint64_t activations = 0;
  /** Neurons it computed, over jobs and their tokens, padding left out; and bytes of their weights. */
  uint64_t neurons = 0;
  uint64_t weight_bytes_read = 0;
  /** Time of these jobs; in them, the CPU's part, and waiting for the unit after it. The unit's own, if it tells. */
  uint64_t job_ns = 0;
  uint64_t cpu_ns = 0;
  uint64_t wait_ns = 0;
  uint64_t busy_ns = 0;
};

/**
 * Experts computed by two: the first clusters of a bank by a dense unit, the neurons behind them by other experts on the CPU
 * at the same time (paper section 1.3). How many clusters, the schedule says by the tokens of the job; a graph of another
 * shape is made active at that very job, and all that the schedule has are loaded.
 *
 * A unit that runs on this machine's cores takes them away from the pool while it computes; where that leaves none, the two
 * take turns.
 */
class HybridExperts : public Experts {
 public:
  /** All must outlive this object. The unit has loaded every graph of the schedule. */
  HybridExperts(const EngineConfig& config, ThreadPool& pool, Experts& cpu, DenseUnit& unit)
      : config_(&config), pool_(&pool), cpu_(&cpu), unit_(&unit), schedule_(config.unit.clusters) {}

  /** Whether the jobs of the next step are the unit's too: not where the step records what fires. Between steps. */
  void use_unit(bool is_used) { is_used_ = is_used; }
  /** Another schedule, whose graphs are loaded. Between steps. */
  void set_schedule(const UnitConfig::Schedule& schedule) { schedule_ = schedule; }
  const UnitConfig::Schedule& schedule() const { return schedule_; }

  void begin(const ExpertJob& job) override;
  Status run(const ExpertJob& job) override;
  void cancel() override { cpu_->cancel(); }

  UnitCounters unit_counters() const;
  const DenseUnit& unit() const { return *unit_; }

 private:
  GraphShape shape_of(const ExpertJob& job) const;
  ExpertJob rest_of(const ExpertJob& job, GraphShape shape) const;
  Status start_unit(const ExpertJob& job, GraphShape shape);
  void add_sums(const ExpertJob& job) const;

  const EngineConfig* config_;
  ThreadPool* pool_;
  Experts* cpu_;
  DenseUnit* unit_;
  UnitConfig::Schedule schedule_;
  bool is_used_ = true;
  UnitCounters unit_counters_;
};

}  // namespace pi2
