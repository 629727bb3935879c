{
  "target_defaults": {
    "include_dirs": ["<(module_root_dir)"],
    "cflags": ["-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"],
    "cflags_cc!": ["-std=gnu++17", "-fno-exceptions"],
    "cflags_cc": ["-std=c++20", "-O3", "-fno-exceptions", "-fno-rtti"],
  },
  "targets": [
    {"target_name": "kernels_scalar", "type": "static_library", "sources": ["native/kernels/scalar.cc"]},
    # Weights on flash must not depend on the machine that wrote them: no fused multiply-add.
    {
      "target_name": "quantize",
      "type": "static_library",
      "sources": ["native/quantize/encode.cc", "native/quantize/cluster.cc"],
      "cflags_cc": ["-ffp-contract=off"],
    },
    {
      "target_name": "core",
      "type": "static_library",
      "sources": [
        "<!@(ls native/base/*.cc native/storage/*.cc native/cache/*.cc native/engine/*.cc native/npu/*.cc native/predictor/*.cc | grep -v _test.cc)",
        "native/kernels/dispatch.cc",
      ],
    },
    {
      "target_name": "pi2",
      "sources": ["<!@(ls native/addon/*.cc)"],
      "include_dirs": ["<!(node -p \"require('node-addon-api').include_dir\")"],
      "defines": ["NAPI_VERSION=9", "NODE_ADDON_API_DISABLE_CPP_EXCEPTIONS"],
      "dependencies": ["core", "quantize", "kernels_scalar"],
      "conditions": [
        ["target_arch=='x64'", {"dependencies": ["kernels_avx2", "kernels_avx512", "kernels_amx"]}],
        ["target_arch=='arm64'", {"dependencies": ["kernels_neon"]}],
      ],
    },
  ],
  "conditions": [
    ["target_arch=='x64'", {
      "targets": [
        {
          "target_name": "kernels_avx2",
          "type": "static_library",
          "sources": ["native/kernels/avx2.cc"],
          "cflags": ["-mavx2", "-mfma", "-mf16c"],
        },
        {
          "target_name": "kernels_avx512",
          "type": "static_library",
          "sources": ["native/kernels/avx512.cc"],
          "cflags": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
          # GCC 12 takes the undefined pass-through operand of its own intrinsics for a bug of ours.
          "cflags_cc": ["-Wno-maybe-uninitialized", "-Wno-uninitialized"],
        },
        {
          "target_name": "kernels_amx",
          "type": "static_library",
          "sources": ["native/kernels/amx.cc"],
          "cflags": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
          "cflags_cc": ["-Wno-maybe-uninitialized", "-Wno-uninitialized"],
        },
      ],
    }],
    ["target_arch=='arm64'", {
      "targets": [
        {
          "target_name": "kernels_neon",
          "type": "static_library",
          "sources": ["native/kernels/neon.cc"],
          "cflags": ["-march=armv8.2-a+dotprod+fp16"],
        },
      ],
    }],
  ],
}
