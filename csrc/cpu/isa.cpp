// KORE_BUILT_ISA is the highest level that the compiler knew; levels above it have no code here.
#include "kernel.h"

#if KORE_BUILT_ISA >= 4
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if KORE_BUILT_ISA >= 4
// Linux gives a process the tile registers only when it asks for them.
bool tiles_granted() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// The compiler's cpu_supports asks cpuid and, with xgetbv, whether the operating system keeps the registers.
bool has(int isa) {
    switch (isa) {
#if KORE_BUILT_ISA >= 1
        case KORE_AVX2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if KORE_BUILT_ISA >= 2
        case KORE_AVX512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if KORE_BUILT_ISA >= 3
        case KORE_AVX512_BF16:
            return __builtin_cpu_supports("avx512bf16");
#endif
#if KORE_BUILT_ISA >= 4
        case KORE_AMX_BF16:
            return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && tiles_granted();
#endif
        default:
            return false;
    }
}

}  // namespace

int kore_cpu_isa(void) {
    static const int best = [] {
        int isa = KORE_PORTABLE;
        while (has(isa + 1)) ++isa;
        return isa;
    }();
    return best;
}

const kore::Kernel& kore::select([[maybe_unused]] int isa, kore_dtype dtype, [[maybe_unused]] bool weighted) {
    // Weighted rows no longer fit into bfloat16: they are multiplied as float32.
    [[maybe_unused]] const bool pairs = dtype == KORE_BFLOAT16 && !weighted;
#if KORE_BUILT_ISA >= 4
    if (isa >= KORE_AMX_BF16 && pairs) return amx_bf16_kernel();
#endif
#if KORE_BUILT_ISA >= 3
    if (isa >= KORE_AVX512_BF16 && pairs) return avx512_bf16_kernel();
#endif
#if KORE_BUILT_ISA >= 2
    if (isa >= KORE_AVX512) return avx512_kernel(dtype);
#endif
#if KORE_BUILT_ISA >= 1
    if (isa >= KORE_AVX2) return avx2_kernel(dtype);
#endif
    return portable_kernel(dtype);
}

kore::DropRow kore::select_drop_row([[maybe_unused]] int isa, int element_bytes) {
#if KORE_BUILT_ISA >= 2
    if (isa >= KORE_AVX512) return avx512_drop_row(element_bytes);
#endif
#if KORE_BUILT_ISA >= 1
    if (isa >= KORE_AVX2) return avx2_drop_row(element_bytes);
#endif
    return portable_drop_row(element_bytes);
}
