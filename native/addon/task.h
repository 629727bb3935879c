#pragma once
#include <napi.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "native/addon/arguments.h"
#include "native/base/status.h"

namespace pi2 {

/**
 * One piece of native work behind a promise: `work` runs off the JavaScript thread, then `result` makes the value on it. The
 * objects in `kept` are referenced until then, so that their memory stays where it is.
 */
class Task : public Napi::AsyncWorker {
 public:
  static Napi::Promise run(Napi::Env env, std::vector<Napi::Object> kept, std::function<Status()> work,
                           std::function<Napi::Value(Napi::Env)> result) {
    auto* task = new Task(env, std::move(work), std::move(result));
    for (const Napi::Object& object : kept) task->kept_.push_back(Napi::Persistent(object));
    const Napi::Promise promise = task->deferred_.Promise();
    task->Queue();
    return promise;
  }

  /** A promise already rejected with the status of a bad request. */
  static Napi::Promise refuse(Napi::Env env, const Status& status) {
    const auto deferred = Napi::Promise::Deferred::New(env);
    deferred.Reject(to_error(env, status).Value());
    return deferred.Promise();
  }

 protected:
  void Execute() override { status_ = work_(); }

  void OnOK() override {
    const Napi::HandleScope scope(Env());
    if (status_.is_ok()) {
      deferred_.Resolve(result_(Env()));
    } else {
      deferred_.Reject(to_error(Env(), status_).Value());
    }
  }

 private:
  Task(Napi::Env env, std::function<Status()> work, std::function<Napi::Value(Napi::Env)> result)
      : AsyncWorker(env), work_(std::move(work)), result_(std::move(result)), deferred_(Napi::Promise::Deferred::New(env)) {}

  std::function<Status()> work_;
  std::function<Napi::Value(Napi::Env)> result_;
  Napi::Promise::Deferred deferred_;
  std::vector<Napi::ObjectReference> kept_;
  Status status_;
};

}  // namespace pi2
