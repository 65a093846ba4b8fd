"""What holds each library to an instruction set: variables that it reads when it is loaded.

oneDNN is in torch and in OpenVINO, MKL in torch, XLA in JAX. ONNX Runtime has no such setting.
"""

VARIANTS: dict[str, dict[str, str]] = {
    "avx2": {
        "FASTRNN_CPU": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    },
    "avx512": {
        "FASTRNN_CPU": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX512",
    },
}
