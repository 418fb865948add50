// Time of one iteration of a loop inside a kernel, and the table in which it is printed.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace probe {

constexpr int kIterations = 2000;
constexpr int kRepetitions = 7;
constexpr int kWarmUps = 2;
constexpr int kPortableCluster = 8;  // a larger one has to be allowed

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "probe: %s: %s\n", what, cudaGetErrorString(error));
    std::exit(EXIT_FAILURE);
}

// A launch: how many blocks of how many threads, in clusters or all at once.
struct Shape {
    int blocks;
    int threads;
    int cluster = 1;
    bool cooperative = false;
    int shared_bytes = 0;
};

// A launch's configuration, which points to attributes of its own.
class Configuration {
  public:
    explicit Configuration(const Shape& shape) {
        config_.gridDim = dim3(shape.blocks);
        config_.blockDim = dim3(shape.threads);
        config_.dynamicSmemBytes = shape.shared_bytes;
        config_.attrs = attributes_;
        if (shape.cluster > 1) {
            cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = shape.cluster;
            attribute.val.clusterDim.y = 1;
            attribute.val.clusterDim.z = 1;
        }
        if (shape.cooperative) {
            cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
            attribute.id = cudaLaunchAttributeCooperative;
            attribute.val.cooperative = 1;
        }
    }
    Configuration(const Configuration&) = delete;
    Configuration& operator=(const Configuration&) = delete;

    const cudaLaunchConfig_t* get() const { return &config_; }

  private:
    cudaLaunchAttribute attributes_[2] = {};
    cudaLaunchConfig_t config_ = {};
};

template <class Kernel>
void allow(Kernel* kernel, const Shape& shape) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes),
          "shared memory of a block");
    if (shape.cluster > kPortableCluster) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "a cluster over 8");
    }
}

// How many clusters of that shape the device can hold at once, none if it has no such clusters.
template <class Kernel>
int clusters_that_fit(Kernel* kernel, const Shape& shape) {
    allow(kernel, shape);
    int clusters = 0;
    const Configuration configuration(shape);
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, configuration.get()) == cudaSuccess) return clusters;
    cudaGetLastError();  // taken: the next call must not find it
    return 0;
}

// Buffers that kernels may use.
struct Buffers {
    unsigned* counter;  // zero when a kernel starts
    float* exchanged;
    float* out;  // a number for each block

    static constexpr size_t kExchangedBytes = 64 << 20;
    static constexpr size_t kOutBytes = 1 << 20;

    Buffers() {
        check(cudaMalloc(&counter, sizeof(unsigned)), "memory");
        check(cudaMalloc(&exchanged, kExchangedBytes), "memory");
        check(cudaMalloc(&out, kOutBytes), "memory");
        check(cudaMemset(exchanged, 0, kExchangedBytes), "memory");
    }
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;
    ~Buffers() {
        cudaFree(counter);
        cudaFree(exchanged);
        cudaFree(out);
    }
};

class Timer {
  public:
    explicit Timer(const Buffers& buffers) : buffers_(buffers) {
        check(cudaEventCreate(&start_), "event");
        check(cudaEventCreate(&stop_), "event");
    }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;
    ~Timer() {
        cudaEventDestroy(start_);
        cudaEventDestroy(stop_);
    }

    // Nanoseconds of an iteration, a median. The kernel takes the number of iterations first. What happens once, the
    // launch and the filling of buffers, cancels: it is in both of the two runs that are subtracted.
    template <class... Parameters, class... Arguments>
    double nanoseconds(void (*kernel)(int, Parameters...), const Shape& shape, const Arguments&... arguments) {
        allow(kernel, shape);
        std::vector<double> found;
        for (int i = 0; i < kWarmUps + kRepetitions; ++i) {
            const double once = milliseconds(kernel, shape, kIterations, arguments...);
            const double twice = milliseconds(kernel, shape, 2 * kIterations, arguments...);
            if (i >= kWarmUps) found.push_back((twice - once) * 1e6 / kIterations);
        }
        std::sort(found.begin(), found.end());
        return found[found.size() / 2];
    }

    // The first number of `out`, that the last kernel left.
    float first_result() const {
        float result = 0;
        check(cudaMemcpy(&result, buffers_.out, sizeof(result), cudaMemcpyDeviceToHost), "result");
        return result;
    }

  private:
    template <class... Parameters, class... Arguments>
    double milliseconds(void (*kernel)(int, Parameters...), const Shape& shape, int iterations,
                        const Arguments&... arguments) {
        const Configuration configuration(shape);
        check(cudaMemset(buffers_.counter, 0, sizeof(unsigned)), "counter");
        check(cudaEventRecord(start_), "event");
        check(cudaLaunchKernelEx(configuration.get(), kernel, iterations, arguments...), "launch");
        check(cudaEventRecord(stop_), "event");
        check(cudaEventSynchronize(stop_), "kernel");
        float elapsed = 0;
        check(cudaEventElapsedTime(&elapsed, start_, stop_), "event");
        return elapsed;
    }

    const Buffers& buffers_;
    cudaEvent_t start_ = nullptr;
    cudaEvent_t stop_ = nullptr;
};

// Prints a line for each figure, and writes it to a CSV file if there is one.
class Table {
  public:
    explicit Table(const char* path) {
        std::printf("%-28s %6s %7s %7s %-24s %12s\n", "probe", "blocks", "threads", "cluster", "size", "ns a step");
        if (path == nullptr) return;
        file_ = std::fopen(path, "w");
        if (file_ == nullptr) {
            std::fprintf(stderr, "probe: cannot write %s\n", path);
            std::exit(EXIT_FAILURE);
        }
        std::fprintf(file_, "probe,blocks,threads,cluster,size,ns\n");
    }
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;
    ~Table() {
        if (file_ != nullptr) std::fclose(file_);
    }

    void add(const char* name, const Shape& shape, const std::string& size, double nanoseconds) {
        std::printf("%-28s %6d %7d %7d %-24s %12.1f\n", name, shape.blocks, shape.threads, shape.cluster, size.c_str(),
                    nanoseconds);
        std::fflush(stdout);
        if (file_ == nullptr) return;
        std::fprintf(file_, "%s,%d,%d,%d,%s,%.2f\n", name, shape.blocks, shape.threads, shape.cluster, size.c_str(),
                     nanoseconds);
        std::fflush(file_);
    }

  private:
    std::FILE* file_ = nullptr;
};

}  // namespace probe
