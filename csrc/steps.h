// Which rows a launch of a sweep works on.
#pragma once
#include <algorithm>
#include <vector>

#include "sweep.h"

namespace rnnkern {

// One time step as a launch sees it: where its rows start, in steps (padded) or rows (packed), and how many sequences
// have it, the first ones.
struct Moment {
    int64_t index, count;
};

// The steps that meet in a launch, for each direction: the one before it in the order of the sweep, its own, and the
// one after it.
struct Step {
    Moment before[kMostDirections], now[kMostDirections], after[kMostDirections];
    bool first;      // of the launches: no step before it
    int64_t number;  // of the launch
};

class Steps {
  public:
    Steps(const Sizes& sizes, const Sequences& sequences) : sizes_(sizes), counts_(sequences.counts) {
        if (counts_ == nullptr) return;
        starts_.resize(sizes.steps);
        int64_t rows = 0;
        for (int64_t t = 0; t < sizes.steps; ++t) {
            starts_[t] = rows;
            rows += counts_[t];
        }
    }

    // The launch number n of the sweep that begins at the last step if `from_end`; the other direction goes the other
    // way.
    Step at(int64_t n, bool from_end) const {
        Step step{};
        step.first = n == 0;
        step.number = n;
        for (int d = 0; d < kMostDirections; ++d) {
            const bool falling = from_end != (d == 1);
            const int64_t t = falling ? sizes_.steps - 1 - n : n, ahead = falling ? -1 : 1;
            step.before[d] = moment(t - ahead);
            step.now[d] = moment(t);
            step.after[d] = moment(t + ahead);
        }
        return step;
    }

    // The launch number n of a backward sweep over launches begin to end: the first finds no step before it, and one
    // more at the end no step of its own, so that what goes from range to range is carried as from and to the outside.
    Step of_range(int64_t n, int64_t begin, int64_t end) const {
        Step step = at(n, true);
        step.first = n == begin;
        for (int d = 0; d < kMostDirections; ++d) {
            if (n == begin) step.before[d].count = 0;
            if (n == end) step.now[d].count = 0;
        }
        return step;
    }

    // How many sequences a launch has something to do for.
    int64_t most(const Step& step) const {
        int64_t found = 0;
        for (int d = 0; d < sizes_.directions; ++d) found = std::max({found, step.before[d].count, step.now[d].count});
        return found;
    }

  private:
    Moment moment(int64_t t) const {
        if (t < 0 || t >= sizes_.steps) return {t, 0};
        return counts_ == nullptr ? Moment{t, sizes_.batch} : Moment{starts_[t], counts_[t]};
    }

    Sizes sizes_;
    const int64_t* counts_;
    std::vector<int64_t> starts_;
};

}  // namespace rnnkern
