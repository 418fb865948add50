// The functions of a small library that the tests of the emulator load: the self-tests and the defects, by name.
#include "defects.h"
#include "emulator.h"
#include "selftest.h"

#define RNNKERN_EXPORT extern "C" __attribute__((visibility("default")))

// Nothing, or what went wrong.
RNNKERN_EXPORT const char* run_selftest(const char* name, const void* in, void* out) {
    const cudaError_t error = rnnkern::selftest(name, in, out, nullptr);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

RNNKERN_EXPORT const char* run_defect(const char* name, float* numbers) {
    const cudaError_t error = rnnkern::defect(name, numbers);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

RNNKERN_EXPORT void set_schedule(unsigned seed) {
    rnnkern::host::set_schedule(seed);
}
