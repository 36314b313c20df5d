// out = L R + bias + scaling P Q + add: what a tile of out needs beside the products.
#pragma once

#include "common.cuh"
#include "tiles.h"

namespace kore {

template <class T>
struct Work {
    int64_t rows, columns;  // of out
    int64_t valid;          // columns beyond it are zero
    int tiles_down, tiles_right;
    Schedule schedule;      // of the scaled product
    int blocks;             // of the other one
    float scaling;
    const T* bias;
    const T* add;
    int64_t stride_add;
    T* out;
    int64_t stride_out;
    float4* parts;

    static constexpr int GROUP = 8;  // rows of tiles in a band

    __device__ Tile tile(int index) const { return tile_of_rectangle(index, tiles_down, tiles_right, GROUP); }

    // Elements j and j + 1 of a row of bias or add, which begins at a multiple of 4 bytes; j is even.
    __device__ uint32_t load(const T* row, int64_t j) const {
        if (j + 1 < valid) return __ldg(reinterpret_cast<const uint32_t*>(row + j));
        if (j < valid) return __ldg(reinterpret_cast<const uint16_t*>(row + j));
        return 0;
    }

    __device__ float2 load_bias(int64_t j) const { return bias ? unpack<T>(load(bias, j)) : make_float2(0, 0); }

    __device__ float2 load_add(int64_t i, int64_t j) const {
        return i < rows ? unpack<T>(load(add + i * stride_add, j)) : make_float2(0, 0);
    }

    // Writes scaling * (a, b) + bias + add to elements j and j + 1 of row i; j is even.
    __device__ void write(int64_t i, int64_t j, float a, float b) const {
        if (i >= rows || j >= columns) return;
        const float2 first = load_bias(j), second = add ? load_add(i, j) : make_float2(0, 0);
        a = scaling * a + first.x + second.x;
        b = scaling * b + first.y + second.y;
        const uint32_t pair = pack<T>(j < valid ? a : 0, j + 1 < valid ? b : 0);
        T* at = out + i * stride_out + j;
        if (j + 1 < columns)
            *reinterpret_cast<uint32_t*>(at) = pair;
        else
            *reinterpret_cast<uint16_t*>(at) = uint16_t(pair);
    }
};

}  // namespace kore
