#include "native/base/trace.h"

#include <algorithm>
#include <iterator>

#include "native/base/carver.h"

namespace pi2 {
namespace {

constexpr const char* kNames[] = {"none",    "step", "embed", "layer", "prefetch",        "fill",       "attention", "ffn",
                                  "predict", "find", "plan",  "round", "resident",        "gate",       "row",       "wait",
                                  "unit",    "sum",  "head",  "read",  "missing neurons", "flash bytes"};
/** Shorter spans are of tasks that found nothing to do: they are left out. */
constexpr uint64_t kShortestNs = 100;

static_assert(std::size(kNames) == static_cast<size_t>(TraceStage::kStageCount));

}  // namespace

const char* trace_stage_name(TraceStage stage) { return kNames[static_cast<size_t>(stage)]; }

size_t Trace::bytes_needed(size_t threads, size_t records) {
  Carver carver(nullptr);
  if (records == 0) return 0;
  carver.take<Ring>(threads);
  carver.take<TraceRecord>(threads * records);
  return carver.used();
}

Trace::Trace(uint8_t* memory, size_t threads, size_t records) : threads_(threads), capacity_(records) {
  Carver carver(memory);
  rings_ = carver.take<Ring>(threads);
  auto* all = carver.take<TraceRecord>(threads * records);
  for (size_t i = 0; i < threads; i++) rings_[i] = {all + i * records, 0};
}

void Trace::add(TraceStage stage, uint64_t begin_ns, uint64_t end_ns, uint64_t value) {
  Ring& ring = rings_[trace_thread];
  ring.records[ring.count++ % capacity_] = {begin_ns, end_ns, value, layer_, static_cast<uint16_t>(stage), trace_thread};
}

void Trace::count(TraceStage counter, uint64_t total) {
  uint64_t& last = totals_[static_cast<size_t>(counter)];
  const uint64_t now = trace_now();
  add(counter, now, now, total - last);
  last = total;
}

size_t Trace::size() const {
  size_t records = 0;
  for (size_t i = 0; i < threads_; i++) records += std::min<uint64_t>(rings_[i].count, capacity_);
  return records;
}

uint64_t Trace::dropped() const {
  uint64_t records = 0;
  for (size_t i = 0; i < threads_; i++) records += rings_[i].count - std::min<uint64_t>(rings_[i].count, capacity_);
  return records;
}

void Trace::drain(TraceRecord* records) {
  for (size_t i = 0; i < threads_; i++) {
    Ring& ring = rings_[i];
    const uint64_t kept = std::min<uint64_t>(ring.count, capacity_);
    for (uint64_t k = ring.count - kept; k < ring.count; k++) *records++ = ring.records[k % capacity_];
    ring.count = 0;
  }
}

void TraceSpan::begin(TraceStage stage, uint64_t value) {
  stage_ = stage;
  value_ = value;
  if (trace_thread == 0) {
    outer_ = trace_->stage_;
    trace_->stage_ = stage;
  }
  begin_ns_ = trace_now();
}

void TraceSpan::end() {
  const uint64_t now = trace_now();
  if (now - begin_ns_ >= kShortestNs) trace_->add(stage_, begin_ns_, now, value_);
  if (trace_thread == 0) trace_->stage_ = outer_;
}

void TraceRegion::begin() {
  if (is_open_ || trace_->region_stage_ == TraceStage::kNone) return;
  is_open_ = true;
  place_ = trace_->rings_[trace_thread].count;
  const uint64_t now = trace_now();
  trace_->add(trace_->region_stage_, now, now, 0);
}

void TraceRegion::end() {
  const Trace::Ring& ring = trace_->rings_[trace_thread];
  // A full ring has lost it to what came after it.
  if (is_open_ && ring.count - place_ <= trace_->capacity_) ring.records[place_ % trace_->capacity_].end_ns = trace_now();
}

}  // namespace pi2
