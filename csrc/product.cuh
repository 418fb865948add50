// The recurrent product of a block: for a tile of sequences (rows of a) and units (rows of b, one for each group and
// unit)
//     sums[group](row, unit) = sum over k of a[row][k] b[group, unit][k]
// kept in the registers of the thread that goes on to compute the cell of (row, unit), so that no sum passes through
// global memory. A group is a gate in forward; in backward, where one sum goes over the gates, there is one group.
//
// Rows of a and b are anywhere in global memory, their k adjacent; an absent one counts as zeros. A table in shared
// memory has their addresses. k is taken in chunks of 128 bytes a row. Shared memory:
//     const Element* rows[kRows + kColumns]
//     Element chunks[kStages][kRows + kColumns][kPitch]       kPitch = a chunk and 16 bytes: rows start in different
//     banks
// kStages - 1 chunks are on their way while one is multiplied. In the place of all this, afterwards, the sums:
//     Real sums[kEach][kGroups][kThreads]                     kEach units a thread, which it alone reads
// so that the cell is a loop over them: unrolled over registers it would be hundreds of kilobytes of code.
#pragma once
#include "precision.cuh"

namespace rnnkern {

constexpr int kThreads = 128;
constexpr int kBlocksEach =
    4;  // on a multiprocessor: what shared memory allows of large tiles. Lets a thread have 128 registers
constexpr int kStages = 3;
constexpr int kChunkBytes = 128;
constexpr int kVectorBytes = 16;

// On CUDA cores: a thread has kRowsEach x kUnitsEach sums a group; neighbouring threads have neighbouring units.
template <class Precision, int kGroups, bool kLarge>
struct FmaTile {
    using Element = typename Precision::Element;
    using Real = typename Precision::Real;
    static constexpr int kRowsEach = !kLarge ? 2 : sizeof(Real) == 8 ? 4 : 8;  // two registers a double
    static constexpr int kUnitsEach = kGroups > 1 ? 1 : kLarge ? 4 : 2;
    static constexpr int kAcross = 16;                // threads side by side in units
    static constexpr int kDown = kThreads / kAcross;  // and in rows
    static constexpr int kRows = kDown * kRowsEach, kUnits = kAcross * kUnitsEach;
    static constexpr int kVector = kVectorBytes / sizeof(Element);

    Real sums[kRowsEach][kUnitsEach][kGroups] = {};

    struct alignas(kVectorBytes) Vector {
        Element at[kVector];
    };

    // Adds the products of one chunk: a [kRows][pitch], b [kGroups * kUnits][pitch] in shared memory.
    __device__ __forceinline__ void multiply(const Element* a, const Element* b, int chunk, int pitch) {
        const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
#pragma unroll 2
        for (int k = 0; k < chunk; k += kVector) {
            Vector left[kRowsEach];
#pragma unroll
            for (int i = 0; i < kRowsEach; ++i)
                left[i] = *reinterpret_cast<const Vector*>(a + (down + i * kDown) * pitch + k);
#pragma unroll
            for (int j = 0; j < kUnitsEach; ++j)
#pragma unroll
                for (int group = 0; group < kGroups; ++group) {
                    const Vector right =
                        *reinterpret_cast<const Vector*>(b + (group * kUnits + across + j * kAcross) * pitch + k);
#pragma unroll
                    for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
                        for (int v = 0; v < kVector; ++v) sums[i][j][group] += left[i].at[v] * right.at[v];
                }
        }
    }

    // Which units a thread has sums of: number i of kEach.
    static constexpr int kEach = kRowsEach * kUnitsEach;
    static __device__ __forceinline__ int row(int i) { return threadIdx.x / kAcross + i / kUnitsEach * kDown; }
    static __device__ __forceinline__ int unit(int i) { return threadIdx.x % kAcross + i % kUnitsEach * kAcross; }
    __device__ __forceinline__ Real sum(int i, int group) const { return sums[i / kUnitsEach][i % kUnitsEach][group]; }
};

// On tensor cores: a warp has 16 rows and, in each group, kBlocks blocks of 8 units.
template <class Precision, int kGroups, bool kLarge>
struct MmaTile {
    using Element = typename Precision::Element;
    using Real = float;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kWarpsDown = kLarge ? kWarps : 1;
    static constexpr int kWarpsAcross = kWarps / kWarpsDown;
    static constexpr int kBlocks = kLarge ? (kGroups > 1 ? 2 : 8) : (kGroups > 1 ? 1 : 2);
    static constexpr int kRows = 16 * kWarpsDown, kUnits = 8 * kBlocks * kWarpsAcross;
    static constexpr int kStep = 32 / sizeof(Element);  // of k in one instruction

    float sums[kGroups][kBlocks][4] = {};

    __device__ __forceinline__ void multiply(const Element* a, const Element* b, int chunk, int pitch) {
        const int warp = threadIdx.x / 32;
        a += warp / kWarpsAcross * 16 * pitch;
        b += warp % kWarpsAcross * kBlocks * 8 * pitch;
#pragma unroll 2
        for (int k = 0; k < chunk; k += kStep) {
            uint32_t left[4];
            load_left(left, a + k, pitch);
#pragma unroll
            for (int group = 0; group < kGroups; ++group)
#pragma unroll
                for (int block = 0; block < kBlocks; ++block) {
                    uint32_t right[2];
                    load_right(right, b + (group * kUnits + block * 8) * pitch + k, pitch);
                    Precision::multiply(sums[group][block], left, right);
                }
        }
    }

    static constexpr int kEach = kBlocks * 4;
    static __device__ __forceinline__ int row(int i) {
        return threadIdx.x / 32 / kWarpsAcross * 16 + threadIdx.x % 32 / 4 + i % 4 / 2 * 8;
    }
    static __device__ __forceinline__ int unit(int i) {
        return (threadIdx.x / 32 % kWarpsAcross * kBlocks + i / 4) * 8 + threadIdx.x % 4 * 2 + i % 2;
    }
    __device__ __forceinline__ float sum(int i, int group) const { return sums[group][i / 4][i % 4]; }

  private:
    // 16-bit operands: by whole matrices.
    template <class T>
    static __device__ __forceinline__ void load_left(uint32_t (&r)[4], const T* a, int pitch) {
        const int lane = threadIdx.x % 32;
        load_matrix_x4(r, a + lane % 16 * pitch + lane / 16 * 8);
    }

    template <class T>
    static __device__ __forceinline__ void load_right(uint32_t (&r)[2], const T* b, int pitch) {
        const int lane = threadIdx.x % 32;
        load_matrix_x2(r, b + lane % 8 * pitch + lane / 8 % 2 * 8);
    }

    // float operands: number by number, rounded on the way.
    static __device__ __forceinline__ void load_left(uint32_t (&r)[4], const float* a, int pitch) {
        const int lane = threadIdx.x % 32;
        const float* at = a + lane / 4 * pitch + lane % 4;
        r[0] = to_tf32(at[0]);
        r[1] = to_tf32(at[8 * pitch]);
        r[2] = to_tf32(at[4]);
        r[3] = to_tf32(at[8 * pitch + 4]);
    }

    static __device__ __forceinline__ void load_right(uint32_t (&r)[2], const float* b, int pitch) {
        const int lane = threadIdx.x % 32;
        const float* at = b + lane / 4 * pitch + lane % 4;
        r[0] = to_tf32(at[0]);
        r[1] = to_tf32(at[4]);
    }
};

template <class Precision, int kGroups, bool kLarge, bool kTensorCores = Precision::kTensorCores>
struct TileOf {
    using Type = FmaTile<Precision, kGroups, kLarge>;
};
template <class Precision, int kGroups, bool kLarge>
struct TileOf<Precision, kGroups, kLarge, true> {
    using Type = MmaTile<Precision, kGroups, kLarge>;
};

template <class Tile_, int kGroups>
struct Product {
    using Element = typename Tile_::Element;
    using Real = typename Tile_::Real;
    static constexpr int kRows = Tile_::kRows, kUnits = Tile_::kUnits, kColumns = kGroups * kUnits;
    static constexpr int kChunk = kChunkBytes / sizeof(Element), kVector = kVectorBytes / sizeof(Element),
                         kPitch = kChunk + kVector;
    static constexpr int kTableBytes = (kRows + kColumns) * sizeof(const Element*);
    static constexpr int kSharedBytes =
        kTableBytes + kStages * (kRows + kColumns) * kPitch * static_cast<int>(sizeof(Element));
    static_assert(kTableBytes % kVectorBytes == 0, "chunks start at a multiple of a vector");

    // Multiplies `depth` numbers of each row. row_of_a(row) and row_of_b(group, unit) give addresses, null for an
    // absent row; `anywhere` is some address in global memory. `aligned`: every address and the depth are multiples of
    // a vector.
    template <class RowOfA, class RowOfB>
    static __device__ __forceinline__ void run(Tile_& tile, unsigned char* shared, int64_t depth, bool aligned,
                                               const Element* anywhere, RowOfA row_of_a, RowOfB row_of_b) {
        const Element** rows = reinterpret_cast<const Element**>(shared);
        Element* chunks = reinterpret_cast<Element*>(shared + kTableBytes);
        for (int i = threadIdx.x; i < kRows + kColumns; i += kThreads) {
            rows[i] = i < kRows ? row_of_a(i) : row_of_b((i - kRows) / kUnits, (i - kRows) % kUnits);
        }
        __syncthreads();
        const int64_t count = (depth + kChunk - 1) / kChunk;
        for (int ahead = 0; ahead < kStages - 1; ++ahead) load(chunks, rows, ahead, depth, aligned, anywhere);
        for (int64_t chunk = 0; chunk < count; ++chunk) {
            copy_async_wait<kStages - 2>();
            __syncthreads();  // the chunk is there for all, and nobody reads the one before, whose place is filled next
            load(chunks, rows, chunk + kStages - 1, depth, aligned, anywhere);
            const Element* a = place(chunks, chunk);
            tile.multiply(a, a + kRows * kPitch, kChunk, kPitch);
        }
        copy_async_wait<0>();
    }

    // Calls visit(row, unit, sums of its groups) for all units that this thread has, when `run` is done.
    template <class Visit>
    static __device__ __forceinline__ void each(const Tile_& tile, unsigned char* shared, Visit visit) {
        static_assert(Tile_::kEach * kGroups * kThreads * sizeof(Real) <= kSharedBytes, "the sums find room");
        Real* own = reinterpret_cast<Real*>(shared) + threadIdx.x;
        __syncthreads();  // nobody reads the last chunk any more
#pragma unroll
        for (int i = 0; i < Tile_::kEach * kGroups; ++i) own[i * kThreads] = tile.sum(i / kGroups, i % kGroups);
#pragma unroll 1
        for (int i = 0; i < Tile_::kEach; ++i) {
            Real sums[kGroups];
#pragma unroll
            for (int group = 0; group < kGroups; ++group) sums[group] = own[(i * kGroups + group) * kThreads];
            visit(Tile_::row(i), Tile_::unit(i), sums);
        }
    }

  private:
    static __device__ __forceinline__ Element* place(Element* chunks, int64_t chunk) {
        return chunks + chunk % kStages * ((kRows + kColumns) * kPitch);
    }

    // Starts to load a chunk, zeros behind the end of a row; an empty group where there is none, so that groups can be
    // counted.
    static __device__ __forceinline__ void load(Element* chunks, const Element* const* rows, int64_t chunk,
                                                int64_t depth, bool aligned, const Element* anywhere) {
        constexpr int kVectors = kChunk / kVector;
        const int64_t first = chunk * kChunk;
        Element* to = place(chunks, chunk);
        for (int i = threadIdx.x; first < depth && i < (kRows + kColumns) * kVectors; i += kThreads) {
            const Element* row = rows[i / kVectors];
            const int64_t k = first + i % kVectors * kVector;
            Element* vector = to + i / kVectors * kPitch + i % kVectors * kVector;
            if (aligned) {
                const bool there = row != nullptr && k < depth;
                copy_async16(vector, there ? row + k : anywhere, there ? kVectorBytes : 0);
            } else {
                for (int v = 0; v < kVector; ++v) {
                    if (row != nullptr && k + v < depth) {
                        vector[v] = row[k + v];
                    } else {
                        store(vector + v, 0);
                    }
                }
            }
        }
        copy_async_commit();
    }
};

}  // namespace rnnkern
