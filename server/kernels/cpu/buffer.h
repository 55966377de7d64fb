// Scratch memory that starts on a cache line, so that rows of whole lines are never split between two.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>

namespace boomerang {

// Grows, never shrinks. New memory is zero: the padding at the end of rows is written once, here.
template <class T>
class Buffer {
  public:
    T* at_least(size_t n) {
        if (n > capacity_) {
            capacity_ = std::max(n, capacity_ + capacity_ / 2);
            const size_t bytes = (capacity_ * sizeof(T) + 63) / 64 * 64;
            data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
            std::memset(static_cast<void*>(data_.get()), 0, bytes);
        }
        return data_.get();
    }
    T* data() const { return data_.get(); }

  private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data_;
    size_t capacity_ = 0;
};

}  // namespace boomerang
