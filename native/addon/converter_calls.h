#pragma once
#include <napi.h>

#include "native/base/status.h"
#include "native/engine/bundle_layout.h"

namespace pi2 {

/** Reads and checks a bundle layout object. */
Status read_layout(const Napi::Value& value, BundleLayout* layout);

/** encodeRows, encodeColumns, decodeRows, crc32, bundleChecksums of src/engine/contract.ts. */
void export_converter_calls(Napi::Env env, Napi::Object exports);

}  // namespace pi2
