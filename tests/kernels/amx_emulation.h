// The tile instructions that tiles.h uses, for processors without AMX. Tests only: included ahead of step.cpp (-include).
//
// Whatever the processor would refuse ends the process: shapes that do not fit together, tiles that are not configured.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AMX_BF16__ 1

namespace amx_emulation {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// What ldtilecfg reads.
struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
    int rows = 0, row_bytes = 0;  // none: not configured
    alignas(64) char data[kRows][kRowBytes] = {};
};
inline thread_local Tile tiles[kTiles];

inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "emulated tiles: %s\n", what);
    std::abort();
}

inline Tile& configured(int number) {
    Tile& tile = tiles[number];
    require(tile.rows && tile.row_bytes, "not configured");
    return tile;
}

inline void load_config(const void* from) {
    Config config;
    std::memcpy(&config, from, sizeof config);
    require(config.palette == 1 && config.start_row == 0, "palette or start row");
    for (uint8_t byte : config.reserved) require(byte == 0, "reserved bytes of the configuration");
    for (int i = 0; i < 16; i++) {
        const int rows = config.rows[i], row_bytes = config.row_bytes[i];
        require(i < kTiles ? rows <= kRows && row_bytes <= kRowBytes && !rows == !row_bytes : !rows && !row_bytes, "shape in the configuration");
        if (i >= kTiles) continue;
        tiles[i] = Tile{};
        tiles[i].rows = rows, tiles[i].row_bytes = row_bytes;
    }
}

inline void zero(int number) { std::memset(configured(number).data, 0, sizeof(Tile::data)); }

inline void load(int number, const void* from, long stride) {
    zero(number);  // beyond its shape as well
    Tile& tile = tiles[number];
    for (int r = 0; r < tile.rows; r++) std::memcpy(tile.data[r], static_cast<const char*>(from) + r * stride, tile.row_bytes);
}

inline void store(int number, void* to, long stride) {
    const Tile& tile = configured(number);
    for (int r = 0; r < tile.rows; r++) std::memcpy(static_cast<char*>(to) + r * stride, tile.data[r], tile.row_bytes);
}

// sums [M, N] += a [M, 2 K] b [K, 2 N], pairs of bfloat16 by pairs; vdpbf16ps treats subnormal numbers as tdpbf16ps does.
inline void multiply(int sums, int a, int b) {
    Tile &sum = configured(sums), &left = configured(a), &right = configured(b);
    require(sums != a && sums != b && a != b, "the same tile twice");
    require(sum.rows == left.rows && sum.row_bytes == right.row_bytes && left.row_bytes == 4 * right.rows, "shapes of a product");
    for (int m = 0; m < sum.rows; m++) {
        __m512 row = _mm512_load_ps(sum.data[m]);
        for (int k = 0; k < right.rows; k++) {
            int32_t pair;
            std::memcpy(&pair, left.data[m] + 4 * k, 4);
            row = _mm512_dpbf16_ps(row, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_load_si512(right.data[k]));
        }
        _mm512_store_ps(sum.data[m], row);
    }
}

// Permission to use tiles is granted; everything else is the system's business.
template <class... Arguments>
long system_call(long number, Arguments... arguments) {
    return number == SYS_arch_prctl ? 0 : ::syscall(number, arguments...);
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulation::load_config
#define _tile_zero amx_emulation::zero
#define _tile_loadd amx_emulation::load
#define _tile_stream_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_dpbf16ps amx_emulation::multiply
#define syscall amx_emulation::system_call
