#pragma once
#include <memory>
#include <string>
#include <utility>

#include "native/npu/dense_unit.h"

namespace pi2 {

/** Another unit, of which one job fails: for tests. */
class FaultyUnit : public DenseUnit {
 public:
  /** Jobs are numbered from 1. */
  FaultyUnit(std::unique_ptr<DenseUnit> unit, size_t fail_job) : unit_(std::move(unit)), fail_job_(fail_job) {}

  std::string name() const override { return unit_->name(); }
  void load(GraphShape shape) override { unit_->load(shape); }
  Status finish_loading() override { return unit_->finish_loading(); }
  void unload(GraphShape shape) override { unit_->unload(shape); }
  Status activate(GraphShape shape) override { return unit_->activate(shape); }
  GraphShape active() const override { return unit_->active(); }
  float* inputs() override { return unit_->inputs(); }
  const float* sums() const override { return unit_->sums(); }
  Status start(size_t bank, size_t tokens) override {
    job_++;
    return unit_->start(bank, tokens);
  }
  Status finish() override {
    Status status = unit_->finish();
    return job_ == fail_job_ && status.is_ok() ? Status::unit("job " + std::to_string(job_) + " of the dense unit failed")
                                               : status;
  }
  size_t bytes() const override { return unit_->bytes(); }
  uint64_t busy_ns() const override { return unit_->busy_ns(); }

 private:
  std::unique_ptr<DenseUnit> unit_;
  size_t fail_job_;
  size_t job_ = 0;
};

}  // namespace pi2
