// Blocks of up to 32 rows on AMX tiles (bfloat16 products of 16 x 32 by 32 x 16).
#pragma once
#include "codes.h"

namespace boomerang {

#ifdef __AMX_BF16__

template <class W>
constexpr bool kHasTiles = sizeof(W) < 4;
template <>
constexpr bool kHasTiles<Codes> = false;
constexpr int kTileRows = 2;  // fewer rows are left to registers

// How this thread's tiles are configured. Lives as long as one chunk of work: another library may configure tiles in
// between.
struct TileState {
    int rows = -1;
    bool panel_stays = false;  // several blocks of rows use a panel: it is what the first-level cache should hold
    bool are_off = false;      // rows are to get the sums that they have alone

    // Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights. Tiles have no more rows than there are.
    void configure(int wanted) {
        if (wanted == rows) return;
        rows = wanted;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t columns[16] = {};
            uint8_t rows[16] = {};
        } config;
        const uint8_t low = uint8_t(std::min(rows, 16)), high = uint8_t(rows > 16 ? rows - 16 : 1);
        for (int i = 0; i < 8; i++) config.columns[i] = 64;
        for (int i : {0, 1, 4}) config.rows[i] = low;
        for (int i : {2, 3, 5}) config.rows[i] = high;
        for (int i : {6, 7}) config.rows[i] = 16;
        asm volatile("" : : "r"(&config) : "memory");  // the intrinsic tells the compiler of the first bytes only
        _tile_loadconfig(&config);
    }
};

// Operands that are not used again soon are loaded past the first-level cache, which has room for one of the two.
template <bool past>
inline void load_tile_4(const void* p, long stride) {
    if (past)
        _tile_stream_loadd(4, p, stride);
    else
        _tile_loadd(4, p, stride);
}
template <bool past>
inline void load_tile_5(const void* p, long stride) {
    if (past)
        _tile_stream_loadd(5, p, stride);
    else
        _tile_loadd(5, p, stride);
}

template <bool two, bool panel_stays, bool add, class Between>
inline void tile_block(const Term<bf16>* terms, int num_terms, float* out, long ld, Between&& between) {
    asm volatile("" : : : "memory");  // gcc's tile loads do not say that they read memory: stores before them must not be moved past
    if (add) {
        _tile_loadd(0, out, 4 * ld);
        _tile_loadd(1, out + 16, 4 * ld);
        if (two) {
            _tile_loadd(2, out + 16 * ld, 4 * ld);
            _tile_loadd(3, out + 16 * ld + 16, 4 * ld);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (two) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (const Term<bf16>* t = terms; t < terms + num_terms; t++) {
        const char *line = t->panel, *next = t->ahead.from;
        const bf16* x = t->x;
        const long stride = t->ldx * 2;
        for (int u = 0; u < t->units; u += kUnitStep, line += kUnitStep * kLine<bf16>, x += 2 * kUnitStep) {
            for (int i = 0; i < t->ahead.bytes; i += 64) prefetch_second(next + i);
            next += t->ahead.bytes;
            load_tile_4<panel_stays>(x, stride);
            if (two) load_tile_5<panel_stays>(x + 16 * t->ldx, stride);
            _tile_loadd(6, line, kLine<bf16>);
            _tile_dpbf16ps(0, 4, 6);
            if (two) _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, line + 64, kLine<bf16>);
            _tile_dpbf16ps(1, 4, 7);
            if (two) _tile_dpbf16ps(3, 5, 7);
            between();
        }
    }
    _tile_stored(0, out, 4 * ld);
    _tile_stored(1, out + 16, 4 * ld);
    if (two) {
        _tile_stored(2, out + 16 * ld, 4 * ld);
        _tile_stored(3, out + 16 * ld + 16, 4 * ld);
    }
}

template <bool add, class Between>
inline void block_in_tiles(const Term<bf16>* terms, int num_terms, int rows, float* out, long ld, TileState& tiles, Between&& between) {
    tiles.configure(rows);
    if (rows <= 16)
        tile_block<false, false, add>(terms, num_terms, out, ld, between);
    else if (tiles.panel_stays)
        tile_block<true, true, add>(terms, num_terms, out, ld, between);
    else
        tile_block<true, false, add>(terms, num_terms, out, ld, between);
}

#else

template <class W>
constexpr bool kHasTiles = false;
constexpr int kTileRows = 0;
template <bool add, class... Anything>
void block_in_tiles(Anything&&...);  // never called
struct TileState {
    bool panel_stays = false, are_off = false;
};

#endif

}  // namespace boomerang
