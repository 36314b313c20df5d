#include "../kore.h"

const char* kore_message(int status) {
    switch (status) {
        case KORE_OK:
            return "success";
        case KORE_INVALID_ARGUMENT:
            return "a size, dtype or thread count is out of range";
        case KORE_UNSUPPORTED_ISA:
            return "this processor or this build lacks the instruction set";
        case KORE_OUT_OF_MEMORY:
            return "not enough memory for the working buffers";
        case KORE_UNSUPPORTED:
            return "no compiled GPU kernel does this";
        case KORE_CUDA_ERROR:
            return "the CUDA runtime refused a call";
        default:
            return "unknown status";
    }
}
