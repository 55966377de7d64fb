// Draws one token from a row of logits: temperature, then min_p, then top_k, then top_p, as server/engine/sampler.py.
//
// The draw is an exponential race, whose noise is a hash of the token and of the row's number: the same as there. Nothing
// is sorted but the few entries that can matter for top_k and top_p: a histogram over the logits says where the cut lies.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"
#include "step.h"

namespace boomerang {

struct SamplingScratch {
    std::vector<float> weights;
    std::vector<int32_t> candidates;
};

inline int argmax(const float* row, int n) {
    F16 best = set16(-INFINITY);
    for (int i = 0; i < n; i += 16) best = max16(best, choose16(tail16(n - i), load16(row + i, tail16(n - i)), best));
    const F16 top = set16(top16(best));
    for (int i = 0; i < n; i += 16) {
        const int hit = first16(and16(tail16(n - i), equal16(load16(row + i, tail16(n - i)), top)));
        if (hit >= 0) return i + hit;
    }
    return 0;
}

// The noise of token `id`, 32 bits: sampler.py `race_noise` computes the same.
inline uint32_t race_hash(uint32_t id, uint32_t low, uint32_t high) {
    uint32_t h = id * 0x9E3779B9u + low;
    h = (h ^ h >> 16) * 0x7FEB352Du;
    h = (h ^ h >> 15 ^ high) * 0x846CA68Bu;
    return h ^ h >> 16;
}

struct Race {
    uint32_t low, high;
    double best = INFINITY;
    int winner;

    Race(double number, int first) : winner(first) {
        uint64_t bits;
        std::memcpy(&bits, &number, 8);
        low = uint32_t(bits);
        high = uint32_t(bits >> 32);
    }

    void enter(int id, double weight) {
        const double time = -std::log1p(-(race_hash(uint32_t(id), low, high) + 0.5) * 0x1p-32) / weight;
        if (time < best || (time == best && id < winner)) best = time, winner = id;
    }

    // log(weight) below which nobody can arrive before `best`: a token arrives no earlier than its hash says, and hashes
    // begin at half of 2^-32.
    float hopeless() const { return -22.9f - std::log(float(best)); }
};

// Weight of entries [i, i + 16) of a row relative to the likeliest; nothing past the end, nor below `floor`.
struct Weigh {
    const float* row;
    int n;
    F16 peak, inverse, floor;

    F16 log(int i) const {
        const Mask mask = tail16(n - i);
        return (choose16(mask, load16(row + i, mask), set16(-INFINITY)) - peak) * inverse;
    }
    F16 weight(F16 log) const {
        const F16 w = keep16(greater16(log, set16(-80.0f)), exp16(log));
        return choose16(greater16(floor, w), zero16(), w);
    }
};

// All entries of a row. Of most blocks of a sharp distribution nobody can win, and a race that is on passes over most of the
// rest without a logarithm; the first loop over hashes has no branch and is one that compilers turn into vector instructions.
inline int race_of_all(const Weigh& of, int peak_at, double number) {
    constexpr int kBlock = 64;
    alignas(64) float weights[kBlock];
    Race race(number, peak_at);
    race.enter(peak_at, 1.0);
    float hopeless = race.hopeless();
    for (int begin = 0; begin < of.n; begin += kBlock) {
        F16 logs[kBlock / 16], top = set16(-INFINITY);
        for (int j = 0; j < kBlock / 16; j++) logs[j] = of.log(begin + 16 * j), top = max16(logs[j], top);  // in this order a NaN counts for nothing
        if (first16(greater16(top, set16(hopeless))) < 0) continue;
        for (int j = 0; j < kBlock / 16; j++) store16(weights + 16 * j, of.weight(logs[j]));
        auto at_least = [&](int i) { return float(int32_t(race_hash(uint32_t(begin + i), race.low, race.high) >> 8)) * 0x1p-24f; };
        const float bound = float(race.best) * 1.0001f;
        int hits = 0;
        for (int i = 0; i < kBlock; i++) hits |= at_least(i) < bound * weights[i];
        if (!hits) continue;
        for (int i = 0; i < kBlock; i++)
            if (at_least(i) < float(race.best) * 1.0001f * weights[i]) race.enter(begin + i, weights[i]);
        hopeless = race.hopeless();
    }
    return race.winner;
}

inline int draw_token(const float* row, int n, const BsDraw& d, SamplingScratch& scratch) {
    const int peak_at = argmax(row, n);
    if (d.temperature < 1e-5f || !std::isfinite(row[peak_at])) return peak_at;
    const Weigh of = {row, n, set16(row[peak_at]), set16(1.0f / d.temperature), set16(d.min_p)};
    if (d.top_p >= 1.0f && (d.top_k <= 0 || d.top_k >= n)) return race_of_all(of, peak_at, d.uniform);

    // Weights summed per run of 1024 entries: runs without any are passed over.
    scratch.weights.resize(size_t(n) + 16);
    float* weights = scratch.weights.data();
    constexpr int kRun = 1024;
    const int runs = (n + kRun - 1) / kRun;
    static thread_local std::vector<double> run_mass;
    run_mass.assign(runs, 0.0);
    double total = 0.0;
    for (int r = 0; r < runs; r++) {
        F16 sum = zero16();
        for (int i = r * kRun; i < std::min(n, (r + 1) * kRun); i += 16) {
            const F16 w = of.weight(of.log(i));
            store16(weights + i, w);
            sum = sum + w;
        }
        run_mass[r] = sum16(sum);
        total += run_mass[r];
    }

    // Histogram of weights by binary exponent and two bits of mantissa: bucket 0 holds the largest.
    constexpr int kBuckets = 4 * 118;
    static thread_local std::vector<int> count;
    static thread_local std::vector<double> mass;
    count.assign(kBuckets, 0);
    mass.assign(kBuckets, 0.0);
    auto bucket = [](float w) {
        uint32_t bits;
        std::memcpy(&bits, &w, 4);
        return std::min(kBuckets - 1, std::max(0, int((127u << 2) - (bits >> 21))));
    };
    for (int r = 0; r < runs; r++) {
        if (run_mass[r] == 0.0) continue;
        for (int i = r * kRun; i < std::min(n, (r + 1) * kRun); i++)
            if (weights[i] > 0.0f) {
                int b = bucket(weights[i]);
                count[b]++;
                mass[b] += weights[i];
            }
    }
    // top_p is relative to what top_k leaves, so with a top_k all of its entries are gathered, else only top_p's.
    const bool has_limit = d.top_k > 0 && d.top_k < n;
    const long limit = has_limit ? d.top_k : n;
    long gathered = 0;
    double gathered_mass = 0.0;
    int cut = 0;
    for (; cut < kBuckets - 1; cut++) {
        gathered += count[cut];
        gathered_mass += mass[cut];
        if (has_limit ? gathered >= limit : gathered_mass >= d.top_p * total) break;
    }
    auto& candidates = scratch.candidates;
    candidates.clear();
    for (int r = 0; r < runs; r++) {
        if (run_mass[r] == 0.0) continue;
        for (int i = r * kRun; i < std::min(n, (r + 1) * kRun); i++)
            if (weights[i] > 0.0f && bucket(weights[i]) <= cut) candidates.push_back(i);
    }
    std::sort(candidates.begin(), candidates.end(), [&](int a, int b) {
        return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
    });
    if (long(candidates.size()) > limit) candidates.resize(limit);
    double whole = total;
    if (has_limit) {
        whole = 0.0;
        for (int i : candidates) whole += weights[i];
    }
    double kept = 0.0;
    size_t size = 0;
    while (size < candidates.size() && kept < d.top_p * whole) kept += weights[candidates[size++]];
    Race race(d.uniform, candidates[0]);
    for (size_t i = 0; i < size; i++) race.enter(candidates[i], weights[candidates[i]]);
    return race.winner;
}

}  // namespace boomerang
