// The part of a layer between its first two products: queries, keys and values placed, and attention in work items.
#pragma once
#include "engine.h"

namespace boomerang {

// The request of each token of requests [r0, r1), in tokens_.
template <class T, class W>
void Engine<T, W>::find_requests(int r0, int r1) {
    const int first = step_->query_start[r0];
    tokens_.resize(step_->query_start[r1] - first);
    for (int r = r0; r < r1; r++)
        for (int t = step_->query_start[r]; t < step_->query_start[r + 1]; t++) tokens_[t - first] = r;
}

// Back from token t to the first one of this step on the same page. `first`: of tokens_. A page belongs to one thread: its
// first token clears it, and tokens share units of V. Requests of one slot are rows of one: its guesses.
template <class T, class W>
int Engine<T, W>::page_start(int t, int first) const {
    auto slot = [&](int token) { return step_->slots[tokens_[token - first]]; };
    while (t > first && t - first < int(tokens_.size()) && slot(t) == slot(t - 1) && step_->positions[t] % s_.page_size) t--;
    return t;
}

// Head norms, rotary embedding, and K and V into their pages.
template <class T, class W>
void Engine<T, W>::place(int id, const BsLayer& w, int r0, int r1) {
    const int first = step_->query_start[r0], last = step_->query_start[r1];
    find_requests(r0, r1);
    auto rows = [&](int from, int to) {
        place_heads(id, w, from, to, first, 0, all_heads(), qkv_.data() + long(from) * qkv_ld(), qkv_ld());
    };
    if (last - first <= 4) {
        rows(first, last);
    } else {
        const int chunk = last - first > 64 ? 16 : 4;
        auto start = [&](int c) { return page_start(std::min(last, first + c * chunk), first); };
        pool_.run(chunks_for(last - first, chunk), [&](int c, int) { rows(start(c), start(c + 1)); });
    }
    count(kPlace);
}

// Heads [h0, h1) of tokens [from, to), counted through queries, keys and values. `rows` [to - from, ld] begin with head h0.
// `first`: of tokens_.
template <class T, class W>
void Engine<T, W>::place_heads(int id, const BsLayer& w, int from, int to, int first, int h0, int h1, float* rows, long ld) {
    const int D = s_.head_dim, Dp = pages_.padded_dim, P = s_.page_size, half = w.cos ? s_.rotary_dim / 2 : 0, G = group(), H = s_.num_heads, KV = s_.num_kv_heads;
    alignas(64) T keys[kTokensAtOnce * kMostHeadDim];
    auto turn = [&](float* row, auto* out, const void* norm_weight, int position) {
        if (norm_weight && !s_.wide_qk_norm) norm_row(row, row, static_cast<const T*>(norm_weight), static_cast<const T*>(nullptr), D, s_.eps, s_.layer_norm, s_.norm_offset);
        rotate_row(row, out, w.cos + long(position) * half, w.sin + long(position) * half, half, D);
    };
    if (s_.wide_qk_norm)  // all heads are here: heads_at_once
        for (int t = from; t < to; t++) {
            float* row = rows + (t - from) * ld;
            norm_row(row, row, static_cast<const T*>(w.q_norm_w), static_cast<const T*>(nullptr), H * D, s_.eps, s_.layer_norm, s_.norm_offset);
            norm_row(row + H * D, row + H * D, static_cast<const T*>(w.k_norm_w), static_cast<const T*>(nullptr), KV * D, s_.eps, s_.layer_norm, s_.norm_offset);
        }
    for (int t = from, tokens; t < to; t += tokens) {
        const int position = step_->positions[t], slot = position % P, request = tokens_[t - first], last = t + kTokensAtOnce - 1;
        // Tokens that fill lines of a page together.
        const bool whole = kTokensAtOnce > 1 && !has_int8_kv() && slot % kTokensAtOnce == 0 && P % kTokensAtOnce == 0 && last < to && tokens_[last - first] == request &&
                           step_->positions[last] == position + kTokensAtOnce - 1;
        tokens = whole ? kTokensAtOnce : 1;
        const int32_t* table = step_->block_tables + id * step_->layer_stride + step_->slots[request] * step_->slot_stride;
        const long page = table[position / P] * pages_.page_elements();
        // The next ones, if there are as many of the same request.
        const bool more = whole && last + kTokensAtOnce < to && tokens_[last + kTokensAtOnce - first] == request;
        const int next = position + kTokensAtOnce;
        const long next_page = more ? table[next / P] * pages_.page_elements() : 0;
        for (int h = h0; h < h1; h++) {
            float* row = rows + (t - from) * ld + (h - h0) * D;
            if (h >= H && has_int8_kv()) {
                const long number = long(table[position / P]) * KV;
                if (h < H + KV) {
                    turn(row, row, w.k_norm_w, position);
                    write_keys(int8_pages_, static_cast<uint8_t*>(step_->k_pages) + (number + h - H) * int8_pages_.key_bytes(), slot, row);
                } else {
                    write_values(int8_pages_, static_cast<uint8_t*>(step_->v_pages) + (number + h - H - KV) * int8_pages_.value_bytes(), slot, row);
                }
                continue;
            }
            const long at = page + (h < H + KV ? h - H : h - H - KV) * pages_.head_elements();
            if constexpr (kTokensAtOnce > 1)
                if (more) {
                    const long to = next_page + (h < H + KV ? h - H : h - H - KV) * pages_.head_elements();
                    if (h >= H + KV)
                        prefetch_page(pages_, static_cast<T*>(nullptr), static_cast<T*>(step_->v_pages) + to, next % P);
                    else if (h >= H)
                        prefetch_page(pages_, static_cast<T*>(step_->k_pages) + to, static_cast<T*>(nullptr), next % P);
                    else
                        for (int i = 0; i < tokens; i++)
                            for (int d = 0; d < Dp; d += 64 / int(sizeof(X))) prefetch_to_write(q_row(h / G, last + 1 + i) + h % G * Dp + d);
                }
            if (h < H) {
                for (int i = 0; i < tokens; i++) turn(row + i * ld, q_row(h / G, t + i) + h % G * Dp, w.q_norm_w, position + i);
            } else if (h < H + KV) {
                for (int i = 0; i < tokens; i++) turn(row + i * ld, keys + i * Dp, w.k_norm_w, position + i);
                T* k_page = static_cast<T*>(step_->k_pages) + at;
                if (!whole) {
                    write_keys(pages_, k_page, slot, keys);
                } else if constexpr (kTokensAtOnce > 1) {
                    for (int i = 0; D < Dp && i < tokens; i++) std::fill(keys + i * Dp + D, keys + (i + 1) * Dp, T{});
                    write_keys16(pages_, k_page, slot, keys);
                }
            } else {
                T* v_page = static_cast<T*>(step_->v_pages) + at;
                if (!whole)
                    write_values(pages_, v_page, slot, row);
                else if constexpr (kTokensAtOnce > 1)
                    write_values16(pages_, v_page, slot, row, ld);
            }
        }
    }
}

template <class T, class W>
void Engine<T, W>::attention(int id, const BsLayer& w, int r0, int r1) {
    const int window = int(w.window);
    // The first page of which a token at `position` sees something.
    auto first_seen = [&](int position) { return window ? std::max(0, position + 1 - window) / s_.page_size : 0; };
    const int G = group(), P = s_.page_size, D = s_.head_dim, part_size = G * (D + 2);
    const int query_tokens = std::max(1, kQueryRows / G);
    items_.clear();
    merges_.clear();
    int num_parts = 0;
    for (int r = r0; r < r1; r++) {
        const int from = step_->query_start[r], to = step_->query_start[r + 1], page0 = to - from == 1 ? first_seen(step_->positions[from]) : 0;
        const int pages = chunks_for(step_->positions[to - 1] + 1, P) - page0;
        if (const int most = pages_in_part(pages); to - from == 1 && pages > most) {
            const int parts = chunks_for(pages, most);
            for (int h = 0; h < s_.num_kv_heads; h++) {
                merges_.push_back({from, h, num_parts, parts});
                for (int i = 0; i < parts; i++) items_.push_back({r, h, from, to, page0 + pages * i / parts, page0 + pages * (i + 1) / parts, num_parts++});
            }
            continue;
        }
        // Late query blocks see the most positions; starting with them keeps the last chunks short.
        for (int t = from + (to - from - 1) / query_tokens * query_tokens; t >= from; t -= query_tokens) {
            const int end = std::min(t + query_tokens, to);
            for (int h = 0; h < s_.num_kv_heads; h++) items_.push_back({r, h, t, end, first_seen(step_->positions[t]), chunks_for(step_->positions[end - 1] + 1, P), -1});
        }
    }
    float* parts = parts_.at_least(size_t(num_parts) * part_size);
    pool_.run(int(items_.size()), [&](int chunk, int thread) {
        const Item& it = items_[chunk];
        AttentionItem<T> item;
        item.q = q_row(it.head, it.from);
        item.out = attended_.data() + long(it.from) * attended_ld() + long(it.head) * G * D;
        item.part = it.part < 0 ? nullptr : parts + long(it.part) * part_size;
        item.out_stride = attended_ld();
        item.k_pages = static_cast<const T*>(step_->k_pages);
        item.v_pages = static_cast<const T*>(step_->v_pages);
        item.table = step_->block_tables + id * step_->layer_stride + step_->slots[it.request] * step_->slot_stride;
        item.head = it.head;
        item.group = G;
        item.num_tokens = it.to - it.from;
        item.first_position = step_->positions[it.from];
        item.first_page = it.first_page;
        item.end_page = it.end_page;
        item.scale = s_.scale;
        item.window = window;
        if (chunk + 1 < int(items_.size()) && it.to - it.from == 1) {
            const Item& next = items_[chunk + 1];
            item.next_table = step_->block_tables + id * step_->layer_stride + step_->slots[next.request] * step_->slot_stride + next.first_page;
            item.num_next = next.end_page - next.first_page;
            item.next_head = next.head;
        }
        if (has_int8_kv()) return attend_int8<T>(item, int8_pages_, attention_[thread]);
        if constexpr (kHasTiles<T>)
            if (item.num_tokens >= kManyTokens && !item.hides() && attend_many<T>(item, pages_, attention_[thread])) return;
        attend<T>(item, pages_, attention_[thread]);
    });
    for (const Merge& m : merges_)
        for (int g = 0; g < G; g++)
            merge_parts(parts + long(m.part) * part_size + g * (D + 2), m.num_parts, part_size, D, attended_.data() + long(m.token) * attended_ld() + (long(m.head) * G + g) * D);
    count(kAttention);
}

// Pages of one part of a one-token row with so many: whole contexts while they are work enough for every thread. Rows beside
// it do not count, so that its sums are those that it has alone.
template <class T, class W>
int Engine<T, W>::pages_in_part(int pages) const {
    if (pool_.num_threads() == 1) return 1 << 30;
    return std::max(kPagesInBlock, pages * s_.num_kv_heads / (4 * pool_.num_threads()));
}

}  // namespace boomerang
