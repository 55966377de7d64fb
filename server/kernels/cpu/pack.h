// From a checkpoint's matrices to panels, once at load; and single rows back, for embeddings tied to the head.
#pragma once
#include <vector>

#include "buffer.h"
#include "codes_pack.h"
#include "compressed.h"
#include "panels.h"
#include "pool.h"
#include "step.h"

namespace boomerang {

template <class W>
inline int64_t packed_bytes(int N, int K, bool gated) {
    return int64_t(num_panels(N, gated)) * units_of<W>(K) * kLine<W>;
}

template <class W>
void pack_panel(const BsPack& m, int panel, W* target) {
    const int units = units_of<W>(m.K);
    const W* rows[kPanel];
    for (int i = 0; i < kPanel; i++) {
        const int row = source_row(panel * kPanel + i, m.N, m.gated);
        rows[i] = row < 0 ? nullptr : static_cast<const W*>(m.source) + long(row) * m.K;
    }
    for (int u = 0; u < units; u++)
        for (int i = 0; i < kPanel; i++)
            for (int j = 0; j < kPerUnit<W>; j++) {
                const int k = u * kPerUnit<W> + j;
                target[panel_offset<W>(i, k, units)] = rows[i] && k < m.K ? rows[i][k] : W{};
            }
}

#ifdef __AVX512F__
// Whole units of four bytes change places, 16 x 16 at a time. The server is not ready before its weights are packed.
// `once`: what is written is not read soon, and goes past the caches.
template <class T, bool once = true>
void pack_panel_fast(const BsPack& m, int panel, char* target) {
    const int units = units_of<T>(m.K), whole = m.K / kPerUnit<T>;
    if (m.K % kPerUnit<T>) return pack_panel<T>(m, panel, reinterpret_cast<T*>(target));
    for (int half = 0; half < kPanel; half += 16) {
        const T* rows[16];
        for (int i = 0; i < 16; i++) {
            const int row = source_row(panel * kPanel + half + i, m.N, m.gated);
            rows[i] = row < 0 ? nullptr : static_cast<const T*>(m.source) + long(row) * m.K;
        }
        for (int u = 0; u < units; u += 16) {
            __m512i block[16];
            for (int i = 0; i < 16; i++)
                block[i] = rows[i] ? _mm512_maskz_loadu_epi32(tail16(whole - u), rows[i] + u * kPerUnit<T>) : _mm512_setzero_si512();
            transpose16(block);
            for (int i = 0; i < 16; i++) {
                auto* to = reinterpret_cast<__m512i*>(target + long(u + i) * kLine<T> + half * 4);
                once ? _mm512_stream_si512(to, block[i]) : _mm512_store_si512(to, block[i]);
            }
        }
    }
}
#elif defined(__aarch64__)
template <class T, bool once = true>
void pack_panel_fast(const BsPack& m, int panel, char* target) { pack_panel<T>(m, panel, reinterpret_cast<T*>(target)); }
#else
// 8 x 8 four-byte values, rows to columns.
inline void transpose8(__m256i* r) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m256i low = r[i], high = r[i + 4];
        r[i] = _mm256_permute2x128_si256(low, high, 0x20);
        r[i + 4] = _mm256_permute2x128_si256(low, high, 0x31);
    }
}

// The first `size` bytes at p, then zeros; none if size is negative.
inline __m256i first_bytes(const char* p, int size) {
    if (size >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    alignas(32) char bytes[32] = {};
    if (size > 0) std::memcpy(bytes, p, size);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}

// Eight channels from the `eight`th of the panel on: 32 bytes of each from byte `start` of its row, as columns.
template <class T>
void load_columns(const BsPack& m, int panel, int eight, int start, __m256i* block) {
    for (int i = 0; i < 8; i++) {
        const int row = source_row(panel * kPanel + 8 * eight + i, m.N, m.gated), length = m.K * int(sizeof(T));
        block[i] = row < 0 ? _mm256_setzero_si256() : first_bytes(static_cast<const char*>(m.source) + long(row) * length + start, length - start);
    }
    transpose8(block);
}

// As with AVX-512, 8 x 8 units of four bytes at a time.
template <class T, bool once = true>
void pack_panel_fast(const BsPack& m, int panel, char* target) {
    const int units = units_of<T>(m.K);
    for (int u = 0; u < units; u += 8)
        for (int eight = 0; eight < kPanel / 8; eight++) {
            __m256i block[8];
            load_columns<T>(m, panel, eight, 4 * u, block);
            for (int i = 0; i < 8; i++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + long(u + i) * kLine<T> + 32 * eight), block[i]);
        }
}
#endif

template <class W>
inline char* panel_of(const BsPack& m, int panel) {
    return static_cast<char*>(m.target) + long(panel) * units_of<W>(m.K) * kLine<W>;
}

inline void pack_one(const BsPack& m, int panel) {
    if (m.type == BS_FLOAT) return pack_panel_fast<float>(m, panel, panel_of<float>(m, panel));
    if (m.type == BS_BF16) return pack_panel_fast<bf16>(m, panel, panel_of<bf16>(m, panel));
    if (m.type == BS_BF12) {
        static thread_local Buffer<bf16> wide;
        bf16* lines = wide.at_least(size_t(units_of<bf16>(m.K)) * kLineWeights);
        pack_panel_fast<bf16, false>(m, panel, reinterpret_cast<char*>(lines));
        return compress_panel(m, panel, lines);
    }
    with_form(m.type, [&](auto form) {
        if constexpr (decltype(form)::scales == kNested)
            pack_nested_panel(m, panel);
        else
            pack_codes_panel<decltype(form)>(m, panel);
    });
}

// each(matrix, panel) for all panels, on several threads.
template <class Each>
inline void for_panels(const BsPack* matrices, int count, int num_threads, Each&& each) {
    constexpr int kPanelsAtOnce = 16;
    std::vector<std::pair<int, int>> work;  // (matrix, first panel)
    for (int i = 0; i < count; i++)
        for (int p = 0; p < num_panels(matrices[i].N, matrices[i].gated); p += kPanelsAtOnce) work.emplace_back(i, p);
    Pool pool(num_threads);
    pool.begin();
    pool.run(int(work.size()), [&](int i, int) {
        const BsPack& m = matrices[work[i].first];
        const int end = std::min(num_panels(m.N, m.gated), work[i].second + kPanelsAtOnce);
        for (int p = work[i].second; p < end; p++) each(m, p);
#ifndef __aarch64__
        _mm_sfence();
#endif
    });
    pool.end();
}

inline void pack_all(const BsPack* matrices, int count, int num_threads) { for_panels(matrices, count, num_threads, pack_one); }

inline void measure_all(const BsPack* matrices, int count, int num_threads) {
    for_panels(matrices, count, num_threads, [](const BsPack& m, int panel) { m.rest_start[panel + 1] = measure_panel(m, panel); });
    for (int i = 0; i < count; i++) {
        int32_t* start = matrices[i].rest_start;
        *start = 0;
        for (int p = 0; p < num_panels(matrices[i].N, matrices[i].gated); p++) start[p + 1] += start[p];
    }
}

// Row `n` of a packed [N, K] as float.
inline void unpack_row(const Weights& w, int n, float* out, bf12) {
    for (int k = 0; k < w.K; k++) out[k] = to_float(weight_at(w, n, k));
    for (const BsRest* rest = w.rest + w.rest_start[n / kPanel]; rest != w.rest + w.rest_start[n / kPanel + 1]; rest++)
        if (rest->channel == n % kPanel) out[rest->input] = to_float(bf16{rest->bits});
}

template <class W>
inline void unpack_row(const Weights& w, int n, float* out, W) {
    const int units = units_of<W>(w.K);
    const W* data = reinterpret_cast<const W*>(w.data);
    int k = 0;
#ifdef __AVX512F__
    if constexpr (std::is_same<W, bf16>::value) {  // sixteen units at once: each lies in another line
        const __m512i lines = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(kLine<bf16>));
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (; k + 32 <= w.K; k += 32) {
            const __m512i pairs = _mm512_i32gather_epi32(lines, data + panel_offset<W>(n, k, units), 1);
            const __m512i even = _mm512_slli_epi32(pairs, 16), odd = _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)));
            _mm512_storeu_si512(out + k, _mm512_permutex2var_epi32(even, low, odd));
            _mm512_storeu_si512(out + k + 16, _mm512_permutex2var_epi32(even, high, odd));
        }
    }
#endif
    for (; k < w.K; k++) {
        const W value = data[panel_offset<W>(n, k, units)];
        out[k] = to_float(value);
    }
}

}  // namespace boomerang
