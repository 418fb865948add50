// What a time step costs on this GPU: barriers, exchanges of h, and products. The tiers are chosen by these figures.
//
//     nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a benchmarks/gpu/probe.cu -o probe
//     ./probe [--csv FILE]
//
// Every figure is nanoseconds of one iteration of a loop inside one kernel. benchmarks/gpu_run.py does both.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "barriers.cuh"
#include "exchanges.cuh"
#include "products.cuh"
#include "timing.cuh"

namespace probe {
namespace {

constexpr int kThreads = 256;
constexpr int kOldest = 9;  // clusters came with compute capability 9.0

struct Probe {
    const cudaDeviceProp& device;
    const Buffers& buffers;
    Timer& timer;
    Table& table;
};

std::string floats(int count) {
    return std::to_string(count) + " floats a block";
}

void expect(float result, float wanted, const char* name) {
    if (result == wanted) return;
    std::fprintf(stderr, "probe: %s: expected %g, got %g: the exchange is wrong\n", name, wanted, result);
    std::exit(EXIT_FAILURE);
}

void probe_blocks(const Probe& p) {
    const Shape one = {1, kThreads};
    p.table.add("dependent fma", one, "", p.timer.nanoseconds(dependent_fma, one, p.buffers.out));
    for (int threads : {128, 256, 512, 1024}) {
        const Shape shape = {1, threads};
        p.table.add("block barrier", shape, "", p.timer.nanoseconds(block_barrier, shape));
    }
}

void probe_exchanges(const Probe& p, int cluster) {
    for (int slice : {16, 64, 256, 1024}) {
        const int bytes = exchange_bytes(cluster, slice);
        if (bytes > int(p.device.sharedMemPerBlockOptin)) continue;
        const Shape shape = {cluster, kThreads, cluster, false, bytes};
        const double by_barrier = p.timer.nanoseconds(exchange_by_barrier, shape, slice, p.buffers.out);
        expect(p.timer.first_result(), 2 * kIterations, "exchange by barrier");
        p.table.add("exchange by barrier", shape, floats(slice), by_barrier);
        const double by_stores = p.timer.nanoseconds(exchange_by_stores, shape, slice, p.buffers.out);
        expect(p.timer.first_result(), 2 * kIterations, "exchange by stores");
        p.table.add("exchange by st.async", shape, floats(slice), by_stores);
    }
}

// Clusters whose blocks each fill a multiprocessor's shared memory, as those that keep weights there do.
void probe_clusters(const Probe& p) {
    constexpr int kSpare = 1024;  // exchange_by_stores has barriers in static memory
    const int full = int(p.device.sharedMemPerBlockOptin) - kSpare;
    for (int cluster : {2, 4, 8, 16}) {
        const int fit = clusters_that_fit(exchange_by_stores, {cluster, kThreads, cluster, false, full});
        const std::string size = std::to_string(fit) + " fit";
        if (fit == 0) {
            std::printf("clusters of %d do not fit with %d bytes of shared memory a block\n", cluster, full);
            continue;
        }
        for (int blocks : {cluster, cluster * fit}) {
            const Shape shape = {blocks, kThreads, cluster};
            p.table.add("cluster barrier", shape, size, p.timer.nanoseconds(cluster_barrier, shape));
        }
        probe_exchanges(p, cluster);
    }
}

void probe_grids(const Probe& p) {
    for (int blocks : {16, 32, 64, p.device.multiProcessorCount}) {
        const Shape shape = {blocks, kThreads, 1, true};
        p.table.add("grid barrier of CUDA", shape, "", p.timer.nanoseconds(grid_barrier_of_cuda, shape));
        p.table.add("grid barrier by counter", shape, "",
                    p.timer.nanoseconds(grid_barrier_by_counter, shape, p.buffers.counter));
        for (int slice : {16, 128}) {
            const double found = p.timer.nanoseconds(exchange_by_memory, shape, slice, p.buffers.exchanged,
                                                     p.buffers.counter, p.buffers.out);
            expect(p.timer.first_result(), 0, "exchange by memory");
            p.table.add("exchange by memory", shape, floats(slice), found);
        }
    }
}

void probe_products(const Probe& p) {
    const int most = int(p.device.sharedMemPerBlockOptin);
    for (int rows : {64, 128, 256, 512}) {
        for (int depth : {128, 256, 512, 1024}) {
            const std::string size = std::to_string(rows) + " x " + std::to_string(depth) + " x 8";
            for (int threads : {128, 256}) {
                const Shape shape = {1, threads, 1, false, tensor_core_bytes(rows, depth)};
                if (shape.shared_bytes > most) continue;
                p.table.add("product bfloat16", shape, size,
                            p.timer.nanoseconds(product_by_tensor_cores, shape, rows, depth, p.buffers.out));
            }
            const Shape shape = {1, kThreads, 1, false, fma_bytes(rows, depth)};
            if (shape.shared_bytes > most) continue;
            p.table.add("product float32", shape, size,
                        p.timer.nanoseconds(product_by_fma, shape, rows, depth, p.buffers.out));
        }
    }
}

void probe_l2(const Probe& p) {
    for (int kilobytes : {64, 256, 1024, 4096}) {
        for (int blocks : {1, p.device.multiProcessorCount}) {
            const Shape shape = {blocks, kThreads};
            const auto* weights = reinterpret_cast<const float4*>(p.buffers.exchanged);
            p.table.add("weights from L2", shape, std::to_string(kilobytes) + " KB a block",
                        p.timer.nanoseconds(weights_from_l2, shape, kilobytes << 10, weights, p.buffers.out));
        }
    }
}

int run(const char* csv) {
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0), "no device");
    std::printf("%s, compute capability %d.%d, %d multiprocessors, %zu KB shared memory a block, %d MB L2\n",
                device.name, device.major, device.minor, device.multiProcessorCount,
                device.sharedMemPerBlockOptin >> 10, device.l2CacheSize >> 20);
    if (device.major < kOldest) {
        std::fprintf(stderr, "probe: needs compute capability 9.0 or newer\n");
        return EXIT_FAILURE;
    }
    const Buffers buffers;
    Timer timer(buffers);
    Table table(csv);
    const Probe p = {device, buffers, timer, table};
    probe_blocks(p);
    probe_clusters(p);
    probe_grids(p);
    probe_products(p);
    probe_l2(p);
    check(cudaDeviceSynchronize(), "last kernel");
    return EXIT_SUCCESS;
}

}  // namespace
}  // namespace probe

int main(int count, char** words) {
    if (count == 1) return probe::run(nullptr);
    if (count == 3 && std::strcmp(words[1], "--csv") == 0) return probe::run(words[2]);
    std::fprintf(stderr, "usage: %s [--csv FILE]\n", words[0]);
    return EXIT_FAILURE;
}
