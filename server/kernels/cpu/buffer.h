// Scratch memory that starts on a cache line, so that rows of whole lines are never split between two, and lies in huge
// pages when it is large: a block touches a row in each of its lines' pages, more of them than a TLB has entries.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace boomerang {

// Grows, never shrinks. New memory is zero: the padding at the end of rows is written once, here. What cannot be had is a
// std::bad_alloc; the buffer is empty then.
template <class T>
class Buffer {
  public:
    T* at_least(size_t n) {
        if (n > capacity_) {
            const size_t capacity = std::max(n, capacity_ + capacity_ / 2);
            if (capacity > (PTRDIFF_MAX - kHuge) / sizeof(T)) throw std::bad_alloc();
            const size_t page = capacity * sizeof(T) < kHuge ? 64 : kHuge, bytes = (capacity * sizeof(T) + page - 1) / page * page;
            capacity_ = 0;
            data_.reset();
            data_.reset(static_cast<T*>(std::aligned_alloc(page, bytes)));
            if (!data_) throw std::bad_alloc();
            if (page == kHuge) madvise(data_.get(), bytes, MADV_HUGEPAGE);
            std::memset(static_cast<void*>(data_.get()), 0, bytes);
            capacity_ = capacity;
        }
        return data_.get();
    }
    T* data() const { return data_.get(); }

  private:
    static constexpr size_t kHuge = 2 << 20;
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data_;
    size_t capacity_ = 0;
};

}  // namespace boomerang
