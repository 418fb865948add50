// What a planned call does with tensors: rnnkern/backends/numba_cpu/program.py in C++. It makes those that it gives,
// takes a workspace, and starts the sweeps.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <memory>
#include <utility>
#include <vector>

#include "launch.h"

namespace rnnkern {

using Tensors = std::vector<at::Tensor>;
using Numbers = std::vector<Integer>;

// A workspace up to this size is kept for the next call of the thread. A small one takes as long to allocate as to use;
// one that fits the caches is still there, while memory that malloc gives anew may lie elsewhere and fault: steps of a
// batch took up to twice as long. Pages that no workspace reached are never touched.
constexpr Integer MOST_KEPT_BYTES = 4 << 20;

// Asks for huge pages, as rnnkern/backends/pages.py does, which says why. The system is free to refuse.
inline void in_huge_pages(const at::Tensor& tensor) {
#ifdef __linux__
    constexpr Integer PAGE = 2 << 20;
    const auto begin = reinterpret_cast<Integer>(tensor.const_data_ptr());
    const auto first = (begin + PAGE - 1) / PAGE * PAGE;
    const auto last = (begin + static_cast<Integer>(tensor.nbytes())) / PAGE * PAGE;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

class Program {
  public:
    Program(std::vector<std::shared_ptr<Launch>> launches, Tensors constants, std::vector<Numbers> empty,
            std::vector<Numbers> zeroed, Numbers large, Integer space)
        : launches_(std::move(launches)),
          constants_(std::move(constants)),
          empty_(std::move(empty)),
          zeroed_(std::move(zeroed)),
          large_(std::move(large)),
          space_(space) {}

    // The tensors that a call makes from those that it is given, in two lists, the first of which begins with its
    // input. The launches know all of them in this order: the array, the workspace, those given, constants, those made.
    Tensors run(at::TensorList given, at::TensorList more = {}) const {
        const auto options = given[0].options();
        Tensors made;
        made.reserve(empty_.size() + zeroed_.size());
        for (const auto& shape : empty_) made.push_back(at::empty(shape, options));
        for (const auto& shape : zeroed_) made.push_back(at::zeros(shape, options));
        for (auto i : large_) in_huge_pages(made[i]);
        const auto workspace = space_ > MOST_KEPT_BYTES ? at::empty({space_}, at::kByte) : kept_workspace();
        Numbers addresses{0};
        addresses.reserve(2 + given.size() + more.size() + constants_.size() + made.size());
        addresses.push_back(reinterpret_cast<Integer>(workspace.const_data_ptr()));
        for (const auto list : {given, more, at::TensorList(constants_), at::TensorList(made)}) {
            for (const auto& tensor : list) addresses.push_back(reinterpret_cast<Integer>(tensor.const_data_ptr()));
        }
        for (const auto& launch : launches_) (*launch)(addresses, at::get_num_threads());
        return made;
    }

  private:
    static at::Tensor kept_workspace() {
        thread_local const auto kept = at::empty({MOST_KEPT_BYTES}, at::kByte);
        return kept;
    }

    std::vector<std::shared_ptr<Launch>> launches_;
    Tensors constants_;
    std::vector<Numbers> empty_, zeroed_;  // shapes
    Numbers large_;                        // which of those made ask for huge pages
    Integer space_;                        // bytes of the workspace
};

}  // namespace rnnkern
