#pragma once
#include <cstdint>
#include <string>
#include <utility>

namespace pi2 {

/** Kinds of failure that cross into TypeScript, as `NATIVE_...` codes (src/engine/contract.ts). */
enum class StatusCode { kOk, kArgument, kIo, kChecksum, kMemory, kCpu, kBusy, kUnit };

/**
 * The result of an operation that can fail for reasons outside the program: a value, not an exception. The message names the
 * file or argument, for a person.
 */
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status ok() { return Status(); }
  static Status argument(std::string message) { return {StatusCode::kArgument, std::move(message)}; }
  static Status io(std::string message) { return {StatusCode::kIo, std::move(message)}; }
  static Status checksum(std::string message) { return {StatusCode::kChecksum, std::move(message)}; }
  static Status memory(std::string message) { return {StatusCode::kMemory, std::move(message)}; }
  static Status cpu(std::string message) { return {StatusCode::kCpu, std::move(message)}; }
  static Status unit(std::string message) { return {StatusCode::kUnit, std::move(message)}; }

  bool is_ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace pi2
