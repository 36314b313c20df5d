/* The C ABI of KORE's compiled kernels.
 *
 * Plain pointers, int64 shapes and strides (in elements), a dtype code; every function that can fail returns a status.
 * No torch header is needed to build or to call it, so one library serves every torch version.
 */
#ifndef KORE_H
#define KORE_H

#include <stdint.h>

#define KORE_ABI_VERSION 3

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { KORE_FLOAT32 = 0, KORE_BFLOAT16 = 1, KORE_FLOAT16 = 2 } kore_dtype;

/* Instruction sets of the CPU kernels; each level includes those below it. */
typedef enum {
    KORE_PORTABLE = 0,
    KORE_AVX2 = 1,
    KORE_AVX512 = 2,
    KORE_AVX512_BF16 = 3,
    KORE_AMX_BF16 = 4
} kore_isa;

typedef enum {
    KORE_OK = 0,
    KORE_INVALID_ARGUMENT = 1,
    KORE_UNSUPPORTED_ISA = 2,
    KORE_OUT_OF_MEMORY = 3,
    KORE_UNSUPPORTED = 4,
    KORE_CUDA_ERROR = 5
} kore_status;

/* One line of English for a status. */
const char* kore_message(int status);

/* The highest level that this processor, its operating system and this build have. */
int kore_cpu_isa(void);

/* One triangle of C += alpha * sum over rows i of weight[i] * x[i]^T x[i]: C[i][j] for i >= j, or for i <= j if upper.
 *
 * C: (d, d) contiguous. x: (n, d) of the dtype. mask: n bytes, 0 leaves the row out whatever it holds, or NULL.
 * weight: n floats of any sign, or NULL. The result does not depend on the number of threads.
 */
int kore_covariance_update(
    float* C,
    int64_t d,
    const void* x,
    int64_t n,
    int64_t stride_row,
    int64_t stride_column,
    int dtype,
    const uint8_t* mask,
    const float* weight,
    float alpha,
    int upper,
    int isa,
    int threads
);

/* Mirrors one triangle of C (d, d) contiguous, elements of 4 or 8 bytes, onto the other: the upper one if upper. */
int kore_symmetrize(void* C, int64_t d, int element_bytes, int upper, int threads);

/* out = x where the dropout mask keeps, 0 elsewhere. x: (rows, columns), elements of 2, 4 or 8 bytes; out: contiguous,
 * may be x itself.
 *
 * Row i of x is row first_row + i of the mask, which keeps element (row, j) if word j % 4 of Philox 4x32-10 for the key
 * seed and the counter (j / 4, row, 0, 0), shifted right by one bit, is at least threshold (0 .. 2^31 - 1).
 */
int kore_dropout(
    const void* x,
    int64_t rows,
    int64_t columns,
    int64_t stride_row,
    int64_t stride_column,
    int element_bytes,
    int64_t first_row,
    int64_t seed,
    int64_t threshold,
    void* out,
    int isa,
    int threads
);

/* The GPU's kernels run on the current device, in stream order; they neither allocate nor wait. Statuses are of the
 * launch. KORE_UNSUPPORTED: nothing was done, another backend can do it.
 *
 * Compute capability 9.0 has kernels of its own, 8.0 and newer others, older ones none. KORE_CUDA_KERNELS=sm80 in the
 * environment, read once, chooses those of 8.0 on 9.0 too.
 */

/* What the CUDA runtime said when a call in this thread last returned KORE_CUDA_ERROR. */
const char* kore_cuda_message(void);

/* Bytes of device memory that kore_cuda_covariance_update needs beside its arguments. */
int64_t kore_cuda_covariance_workspace(int64_t n, int64_t d);

/* One triangle of C += alpha x^T x, as kore_covariance_update defines it, for x (n, d) bfloat16 or float16 with
 * contiguous rows that begin at multiples of 16 bytes. alpha_factor: a number on the device that multiplies alpha, or
 * NULL. The bits are the same in every run.
 */
int kore_cuda_covariance_update(
    float* C,
    int64_t d,
    const void* x,
    int64_t n,
    int64_t stride_row,
    int dtype,
    float alpha,
    const float* alpha_factor,
    int upper,
    void* workspace,
    int64_t workspace_bytes,
    void* stream
);

/* A matrix on the device, one of whose strides is 1; the other one and the address are multiples of 16 bytes. */
typedef struct {
    const void* data;
    int64_t rows, columns, stride_row, stride_column;
} kore_matrix;

/* Bytes of device memory that kore_cuda_two_products needs beside its arguments. */
int64_t kore_cuda_two_products_workspace(const kore_matrix* out, const kore_matrix* L, const kore_matrix* P);

/* out = L R + bias + scaling P Q + add in one pass over out, or scaling L R + bias + add if P and Q are NULL; bias (a
 * value for each of R's columns) and add may be NULL.
 *
 * All of one dtype, bfloat16 or float16; sums are float32. out and add: contiguous rows. The contiguous dimensions of
 * L, R and P, Q: both products alike, and not L's columns beside R's rows reversed (L^T R is supported, L^T R^T is not).
 * Columns of out beyond R's become zero. L may have more columns than R has rows, and P than Q, if those are zero.
 */
int kore_cuda_two_products(
    const kore_matrix* out,
    const kore_matrix* L,
    const kore_matrix* R,
    const void* bias,
    const kore_matrix* P,
    const kore_matrix* Q,
    float scaling,
    const kore_matrix* add,
    int dtype,
    void* workspace,
    int64_t workspace_bytes,
    void* stream
);

#ifdef __cplusplus
}
#endif

#endif
