// A persistent team for short parallel loops.
//
// Work is cut into chunks. Each thread has a range of neighbouring chunks, so that what it fetches ahead is its own, and
// takes from the ranges of others when it is through. A loop ends when its chunks are done, not when every thread has
// shown up: a worker that the system has put aside (the HTTP thread shares these cores) costs its share of the speed,
// never a wait for it to come back.
#pragma once
#ifndef __aarch64__
#include <immintrin.h>
#endif
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

namespace boomerang {

class Pool {
  public:
    explicit Pool(int num_threads) : num_threads_(num_threads), ranges_(new Range[num_threads]) {
        try {
            for (int i = 1; i < num_threads; i++) workers_.emplace_back([this, i] { work(i); });
        } catch (...) {  // the system gives no more threads
            stop();
            throw;
        }
    }

    ~Pool() { stop(); }

    int num_threads() const { return num_threads_; }

    // Workers spin between `begin` and `end`, so that the loops of one step follow each other without system calls.
    // `doorbell`: an eventfd to be rung once the step is under way, or -1. A worker does it, so that the system call and
    // whoever it wakes cost the calling thread nothing.
    void begin(int doorbell = -1) {
        doorbell_.store(doorbell);
        if (num_threads_ == 1) return ring();
        active_.store(1);
        if (num_asleep_.load()) wake();
    }
    void end() {
        active_.store(0, std::memory_order_release);
        ring();  // in case no worker came
    }

    // body(chunk, thread) for every chunk in [0, num_chunks). If some throw, the others are run all the same, and the first
    // exception goes on to the caller.
    template <class Body>
    void run(int num_chunks, Body&& body) {
        if (num_chunks <= 0) return;
        if (num_threads_ == 1 || num_chunks == 1) {
            for (int i = 0; i < num_chunks; i++) body(i, 0);
            return;
        }
        uint32_t sequence = ++sequence_;
        Job& job = jobs_[sequence % kRing];
        job.call = [](void* context, int chunk, int thread) { (*static_cast<std::remove_reference_t<Body>*>(context))(chunk, thread); };
        job.context = &body;
        job.num_chunks = num_chunks;
        done_.store(0, std::memory_order_relaxed);
        for (int i = 0; i < num_threads_; i++)
            ranges_[i].ticket.store(uint64_t(sequence) << 32 | uint32_t(first(i, num_chunks)), std::memory_order_release);
        take_chunks(0);
        for (int spin = 0; done_.load(std::memory_order_acquire) != num_chunks; spin++) pause(spin);
        if (has_failed_.exchange(false, std::memory_order_relaxed)) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    // The first chunk of a thread's range.
    int first(int range, int num_chunks) const { return int(int64_t(num_chunks) * range / num_threads_); }

  private:
    struct Job {
        void (*call)(void*, int, int);
        void* context;
        int num_chunks;
    };
    static constexpr int kRing = 4;
    static constexpr int kLinger = 4000;  // pauses before a worker sleeps: the head follows the layers at once

    void ring() {
        if (doorbell_.load(std::memory_order_relaxed) < 0) return;
        const int doorbell = doorbell_.exchange(-1);
        const uint64_t one = 1;
        if (doorbell >= 0 && write(doorbell, &one, sizeof one) < 0) {
        }  // its counter is full: it has been rung
    }

    static void pause(int spin) {
        if (spin < 2000)
#ifdef __aarch64__
            asm volatile("yield");
#else
            _mm_pause();
#endif
        else
            std::this_thread::yield();
    }

    // Ticket = (sequence of the loop, next chunk of the range). A chunk is taken by compare-and-swap on both, so a worker
    // that still remembers an earlier loop can never run a chunk of a later one with the wrong body.
    struct alignas(64) Range {
        std::atomic<uint64_t> ticket{0};
    };

    bool take_chunks(int thread) {
        bool any = false;
        for (int i = 0; i < num_threads_; i++) any |= take_range((thread + i) % num_threads_, thread);
        return any;
    }

    bool take_range(int range, int thread) {
        bool any = false;
        std::atomic<uint64_t>& next = ranges_[range].ticket;
        uint64_t ticket = next.load(std::memory_order_acquire);
        while (true) {
            const Job job = jobs_[(ticket >> 32) % kRing];
            const int chunk = int(uint32_t(ticket));
            if (chunk >= first(range + 1, job.num_chunks)) {
                const uint64_t again = next.load(std::memory_order_acquire);
                if (again == ticket) return any;
                ticket = again;
                continue;
            }
            if (!next.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
            try {
                job.call(job.context, chunk, thread);
            } catch (...) {
                if (!has_failed_.exchange(true)) failure_ = std::current_exception();
            }
            done_.fetch_add(1, std::memory_order_acq_rel);
            any = true;
            ticket = next.load(std::memory_order_acquire);
        }
    }

    void work(int thread) {
        int spin = 0;
        while (!stopping_) {
            if (active_.load(std::memory_order_acquire)) {
                ring();
                if (take_chunks(thread))
                    spin = 0;
                else
                    pause(spin++);
            } else if (spin < kLinger) {
                pause(spin++);
            } else {
                // Either this thread sees that there is work again, or `begin` sees that it sleeps.
                num_asleep_.fetch_add(1);
                uint32_t seen = futex_.load(std::memory_order_acquire);
                if (!active_.load() && !stopping_)
                    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&futex_), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
                num_asleep_.fetch_sub(1);
                spin = 0;
            }
        }
    }

    void stop() {
        stopping_ = true;
        wake();
        for (auto& worker : workers_) worker.join();
    }

    void wake() {
        futex_.fetch_add(1, std::memory_order_release);
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&futex_), FUTEX_WAKE_PRIVATE, 1 << 20, nullptr, nullptr, 0);
    }

    int num_threads_;
    std::vector<std::thread> workers_;
    Job jobs_[kRing] = {};
    uint32_t sequence_ = 0;
    std::unique_ptr<Range[]> ranges_;
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<int> active_{0};
    std::atomic<int> num_asleep_{0};
    std::atomic<int> doorbell_{-1};
    std::atomic<uint32_t> futex_{0};
    std::atomic<bool> stopping_{false}, has_failed_{false};
    std::exception_ptr failure_;
};

}  // namespace boomerang
