// A small random model in every form of weights, run through the C interface: its last hidden states and logits as raw
// floats on standard output, case by case. Built for two kinds of processor, the outputs should agree (test_arm.py).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "step.h"

namespace {

constexpr int kHidden = 256, kInner = 512, kHeads = 4, kKvHeads = 2, kHeadDim = 64, kVocab = 97, kLayers = 2, kPage = 32;
constexpr int kPositions = 128, kSlots = 3, kBlocks = 4;

uint32_t state = 1;
uint32_t random_bits() {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
}
float uniform() { return float(random_bits() >> 8) / (1 << 24) * 2 - 1; }
uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// float16 of about `x`, a power of two and a few bits more.
uint16_t to_half(float x) {
    int exponent;
    const float mantissa = std::frexp(std::fabs(x), &exponent);
    return uint16_t((x < 0) << 15 | (exponent + 14) << 10 | int((mantissa * 2 - 1) * 1023));
}

struct Block {
    int type, bytes, inputs, halves[2];
};
constexpr Block kBlockTypes[] = {
    {BS_Q4_0, 18, 32, {0, -1}}, {BS_Q4_1, 20, 32, {0, 2}}, {BS_Q5_0, 22, 32, {0, -1}}, {BS_Q5_1, 24, 32, {0, 2}}, {BS_Q8_0, 34, 32, {0, -1}},
    {BS_Q4_K, 144, 256, {0, 2}}, {BS_Q5_K, 176, 256, {0, 2}}, {BS_Q6_K, 210, 256, {208, -1}},
};

std::vector<std::shared_ptr<void>> kept;
template <class T>
T* keep(size_t n) {
    auto buffer = std::shared_ptr<T>(static_cast<T*>(aligned_alloc(64, (n * sizeof(T) + 191) / 64 * 64)), free);
    std::memset(static_cast<void*>(buffer.get()), 0, n * sizeof(T));
    kept.push_back(buffer);
    return buffer.get();
}

// Norms, biases, embeddings: of the pair's type.
const void* plain(int n, int type, float scale, float offset) {
    if (type == BS_FLOAT) {
        float* values = keep<float>(n);
        for (int i = 0; i < n; i++) values[i] = uniform() * scale + offset;
        return values;
    }
    uint16_t* values = keep<uint16_t>(n);
    for (int i = 0; i < n; i++) values[i] = to_bf16(uniform() * scale + offset);
    return values;
}

BsWeights weights(int N, int K, int type, bool gated) {
    BsPack item = {};
    item.N = N, item.K = K, item.type = type, item.gated = gated;
    const long groups = K / 32;
    const float size = 0.08f;
    if (type == BS_FLOAT || type == BS_BF16 || type == BS_BF12) {
        item.source = plain(N * K, type == BS_FLOAT ? BS_FLOAT : BS_BF16, size, 0);
        if (type == BS_BF12) {  // some are so small that they have no code
            auto* values = static_cast<uint16_t*>(const_cast<void*>(item.source));
            for (int i = 0; i < N * K; i += 997) values[i] = to_bf16(uniform() * 1e-9f);
        }
    } else if (type == BS_INT8 || type == BS_WIDE || type >= BS_NESTED_4) {
        auto* codes = keep<uint8_t>(size_t(N) * K);
        for (int i = 0; i < N * K; i++) codes[i] = type >= BS_NESTED_4 ? uint8_t(random_bits() >> 13) : uint8_t(int(uniform() * 127));
        item.source = codes;
        if (type >= BS_NESTED_4) {
            auto* scales = keep<uint16_t>(4 * N * groups);
            auto* zero = keep<uint8_t>(N * groups);
            for (int i = 0; i < 4 * N * groups; i++) scales[i] = to_half(size / 100 * (1.5f + uniform() / 2));
            for (int i = 0; i < N * groups; i++) zero[i] = uint8_t(128 + int(uniform() * 20));
            item.source_scale = reinterpret_cast<float*>(scales), item.source_minimum = reinterpret_cast<float*>(zero);
        } else {
            const long n = type == BS_INT8 ? N : 2 * groups * N;
            float *scales = keep<float>(n), *minima = keep<float>(n);
            for (int i = 0; i < n; i++) scales[i] = size / 100 * (1.5f + uniform() / 2), minima[i] = uniform() * size / 10;
            item.source_scale = scales, item.source_minimum = minima;
        }
    } else {
        for (const Block& block : kBlockTypes)
            if (block.type == type) {
                const long count = long(N) * K / block.inputs;
                auto* blocks = keep<uint8_t>(count * block.bytes);
                for (long i = 0; i < count * block.bytes; i++) blocks[i] = uint8_t(random_bits() >> 11);
                for (long i = 0; i < count; i++)
                    for (int at : block.halves)
                        if (at >= 0) {
                            const uint16_t half = to_half((at == block.halves[1] ? -0.5f : 1.0f) * size / (block.inputs == 256 ? 400 : 10) * (1.5f + uniform() / 2));
                            std::memcpy(blocks + i * block.bytes + at, &half, 2);
                        }
                item.source = blocks;
            }
    }
    const long channels = bs_packed_channels(N, gated), panels = channels / 32;
    item.target = keep<char>(bs_packed_bytes(N, K, gated, type) + (1 << 16));  // what is fetched ahead lies behind
    if (type == BS_INT8) item.scale = keep<float>(channels);
    if (type == BS_BF12) {
        item.exponents = keep<uint8_t>(panels * 64), item.rest_start = keep<int32_t>(panels + 1);
        if (bs_measure(&item, 1, 1)) fprintf(stderr, "%s\n", bs_error()), exit(1);
        item.rest = keep<BsRest>(item.rest_start[panels] + 1);
    }
    if (bs_pack(&item, 1, 2)) fprintf(stderr, "%s\n", bs_error()), exit(1);
    BsWeights packed = {};
    packed.data = item.target, packed.scale = item.scale, packed.exponents = item.exponents, packed.rest_start = item.rest_start;
    packed.rest = item.rest, packed.type = type, packed.rows = N;
    return packed;
}

void run(int type, int weight, int kv) {
    state = 12345;
    BsSpec spec = {};
    spec.hidden = kHidden, spec.intermediate = kInner, spec.num_heads = kHeads, spec.num_kv_heads = kKvHeads, spec.head_dim = kHeadDim;
    spec.vocab = kVocab, spec.gated = 1, spec.rotary_dim = kHeadDim, spec.page_size = kPage, spec.type = type, spec.factor_type = type;
    spec.weight_type = weight == BS_FLOAT || weight == BS_BF16 || weight == BS_BF12 ? weight : int(BS_CODES), spec.kv_type = kv;
    spec.eps = spec.stream_eps = 1e-5f, spec.scale = 0.125f, spec.input_scale = 1;
    float *cos = keep<float>(kPositions * kHeadDim / 2), *sin = keep<float>(kPositions * kHeadDim / 2);
    for (int i = 0; i < kPositions * kHeadDim / 2; i++) {
        const double angle = i / (kHeadDim / 2) * std::pow(10000.0, -2.0 * (i % (kHeadDim / 2)) / kHeadDim);
        cos[i] = float(std::cos(angle)), sin[i] = float(std::sin(angle));
    }
    BsLayer layers[kLayers] = {};
    BsDifference differences[kLayers] = {};
    for (BsLayer& layer : layers) {
        layer.attn_norm_w = plain(kHidden, type, 0.1f, 1), layer.mlp_norm_w = plain(kHidden, type, 0.1f, 1), layer.qkv_b = plain((kHeads + 2 * kKvHeads) * kHeadDim, type, 0.1f, 0);
        layer.cos = cos, layer.sin = sin;
        layer.qkv = weights((kHeads + 2 * kKvHeads) * kHeadDim, kHidden, weight, false), layer.o = weights(kHidden, kHeads * kHeadDim, weight, false);
        layer.up = weights(2 * kInner, kHidden, weight, true), layer.down = weights(kHidden, kInner, weight, false);
    }
    BsEnd end = {};
    end.norm_w = plain(kHidden, type, 0.1f, 1), end.head = end.packed_embed = weights(kVocab, kHidden, weight, false);
    const BsEnd ends[2] = {end, end};
    void* engine = nullptr;
    if (bs_create(&engine, &spec, layers, differences, kLayers, ends, 2)) fprintf(stderr, "%s\n", bs_error()), exit(1);
    const int num_pages = kLayers * kSlots * kBlocks;
    void *k_pages = keep<char>(num_pages * bs_page_bytes(&spec, 0)), *v_pages = keep<char>(num_pages * bs_page_bytes(&spec, 1));
    int32_t tables[kLayers][kSlots][kBlocks];
    for (int i = 0; i < num_pages; i++) (&tables[0][0][0])[i] = (i * 7) % num_pages;
    int lengths[kSlots] = {};
    // Requests' new tokens, step by step: one row, few, many; then all decode.
    const int steps[][kSlots] = {{1, 0, 0}, {2, 3, 0}, {33, 50, 19}, {1, 1, 1}, {1, 1, 1}};
    for (const auto& counts : steps) {
        std::vector<int32_t> ids, positions, starts = {0}, slots, rows;
        for (int slot = 0; slot < kSlots; slot++) {
            if (!counts[slot]) continue;
            for (int i = 0; i < counts[slot]; i++) ids.push_back(random_bits() % kVocab), positions.push_back(lengths[slot]++);
            starts.push_back(int(ids.size())), slots.push_back(slot), rows.push_back(int(ids.size()) - 1);
        }
        const int tokens = int(ids.size()), requests = int(slots.size());
        std::vector<int32_t> program;
        for (int layer = 0; layer < kLayers; layer++) program.insert(program.end(), {layer, 0, requests, requests, layer});
        std::vector<float> out(requests * kHidden), logits(requests * kVocab);
        std::vector<int32_t> best(requests);
        BsStep step = {};
        step.num_tokens = step.embed_cut = tokens, step.num_requests = requests, step.num_segments = kLayers, step.num_rows = step.norm_cut = requests;
        step.doorbell = -1, step.program = program.data(), step.input_ids = ids.data(), step.positions = positions.data(), step.query_start = starts.data();
        step.slots = slots.data(), step.block_tables = &tables[0][0][0], step.layer_stride = kSlots * kBlocks, step.slot_stride = kBlocks;
        step.rows = rows.data(), step.k_pages = k_pages, step.v_pages = v_pages, step.out = out.data();
        if (bs_step(engine, &step) || bs_head(engine, out.data(), nullptr, requests, 0, logits.data()) || bs_greedy(engine, out.data(), nullptr, requests, 0, best.data()))
            fprintf(stderr, "%s\n", bs_error()), exit(1);
        for (int r = 0; r < requests; r++)
            for (int n = 0; n < kVocab; n++)
                if (logits[r * kVocab + n] > logits[r * kVocab + best[r]]) fprintf(stderr, "greedy is not the likeliest\n"), exit(1);
        fwrite(out.data(), 4, out.size(), stdout), fwrite(logits.data(), 4, logits.size(), stdout);
    }
    bs_destroy(engine);
    kept.clear();
}

}  // namespace

int main() {
    run(BS_FLOAT, BS_FLOAT, BS_FLOAT);
    run(BS_BF16, BS_BF16, BS_BF16);
    run(BS_BF16, BS_BF12, BS_BF16);
    run(BS_FLOAT, BS_FLOAT, BS_INT8);
    for (int weight : {BS_INT8, BS_Q4_0, BS_Q4_1, BS_Q5_0, BS_Q5_1, BS_Q8_0, BS_Q4_K, BS_Q5_K, BS_Q6_K, BS_WIDE, BS_NESTED_4, BS_NESTED_5, BS_NESTED_6, BS_NESTED_8})
        run(BS_FLOAT, weight, BS_FLOAT);
}
