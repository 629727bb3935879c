{
  "target_defaults": {
    "include_dirs": ["<(module_root_dir)"],
    "cflags": ["-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"],
    "cflags_cc!": ["-std=gnu++17", "-fno-exceptions"],
    "cflags_cc": ["-std=c++20", "-O3", "-fno-exceptions", "-fno-rtti"],
  },
  "targets": [
    # Weights on flash must not depend on the machine that wrote them: no fused multiply-add.
    {
      "target_name": "quantize",
      "type": "static_library",
      "sources": ["native/quantize/encode.cc"],
      "cflags_cc": ["-ffp-contract=off"],
    },
    {
      "target_name": "core",
      "type": "static_library",
      "sources": [
        "<!@(ls native/base/*.cc)",
      ],
    },
    {
      "target_name": "pi2",
      "sources": ["<!@(ls native/addon/*.cc)"],
      "include_dirs": ["<!(node -p \"require('node-addon-api').include_dir\")"],
      "defines": ["NAPI_VERSION=9", "NODE_ADDON_API_DISABLE_CPP_EXCEPTIONS"],
      "dependencies": ["quantize", "core"],
    },
  ],
}
