// Checks and status of an exported C function, which no exception may leave.
#pragma once

#include <atomic>
#include <climits>
#include <new>
#include <optional>
#include <stdexcept>

#include "vector.h"

enum Status { DONE = 0, NO_MEMORY = 1, OUT_OF_RANGE = 2, FAILED = 3 };

struct OutOfRange {};

constexpr int64_t MAX_ROWS = 1 << 20;
constexpr int64_t MAX_ITERATIONS = 1 << 20;

// lowest <= value <= highest
inline void check_range(int64_t value, int64_t lowest, int64_t highest) {
    if (value < lowest || value > highest) throw OutOfRange();
}

// Sizes whose product tokens x n x C fits into 64 bits, and a number of threads.
inline void check_sizes(int64_t tokens, int64_t n, int64_t C, int64_t threads) {
    check_range(tokens, 0, INT64_MAX);
    check_range(n, 1, MAX_STREAMS);
    check_range(C, 1, INT64_MAX / MAX_STREAMS);
    check_range(tokens, 0, INT64_MAX / (n * C));
    check_range(threads, 1, INT_MAX);
}

template <class Body>
int status_of(Body body) noexcept {
    try {
        body();
        return DONE;
    } catch (const OutOfRange&) {
        return OUT_OF_RANGE;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (const std::length_error&) {
        return NO_MEMORY;
    } catch (...) {
        return FAILED;
    }
}

// Memory that every thread of a team allocates for itself. An exception inside a team ends the
// process, and either all of its threads work on or none. So each thread allocates, all wait at a
// barrier, they go on only if `complete()`, and the error is thrown after the team has ended.
class TeamRoom {
    std::atomic<bool> failed{false};

  public:
    template <class Make>
    auto make(Make own) noexcept -> std::optional<decltype(own())> {
        try {
            return own();
        } catch (...) {
            failed = true;
            return std::nullopt;
        }
    }
    bool complete() const { return !failed; }
    void require() const {
        if (failed) throw std::bad_alloc();
    }
};
