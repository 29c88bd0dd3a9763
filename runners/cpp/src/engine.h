// A bundle's graphs, with a KV cache that is allocated once and never copied.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bundle.h"
#include "fresh_memory.h"
#include "layout.h"
#include "onnx.h"

namespace pocketvlm {

// What the vision graph returns for one tile.
struct TileRows {
  std::vector<float> embeds;          // [kept, width]
  std::vector<std::int64_t> indices;  // [kept]
};

class Engine {
 public:
  // Threads are those of the heavy graphs; capacity is in rows of the cache.
  Engine(const Bundle& bundle, int threads, std::int64_t capacity);

  std::int64_t capacity() const { return capacity_; }
  std::int64_t length() const { return length_; }
  std::int64_t width() const { return width_; }

  // One tile, by this vision graph; the one that was used last stays loaded.
  TileRows encode_tile(const Vision& vision, float* pixels, std::size_t numbers);

  // Embeddings [count, width] of tokens.
  std::vector<float> embed(const TokenIds& tokens);

  // Runs rows after those in the cache; returns the last one's logits [vocabulary].
  // `positions` by axis; `is_visual` and `mutual` by row.
  const std::vector<float>& decode(const std::vector<float>& embeds,
                                   const std::vector<std::vector<std::int64_t>>& positions,
                                   const std::vector<bool>& is_visual,
                                   const std::vector<std::int64_t>& mutual);

  // Embeds and runs one token of an answer, without touching memory that is not bound.
  const std::vector<float>& step(std::int64_t token, std::int64_t position);

  // Forgets every row from `length` on; returns how many are left, which are fewer between visual
  // rows and the row that decided which of them are kept.
  std::int64_t truncate(std::int64_t length);

 private:
  struct Graph {
    std::string file, variant;
    Ort::Session session{nullptr};
  };
  struct Buffer {
    std::string name;
    FreshMemory memory;
    Ort::Value value{nullptr};
  };
  // Rows of a call on their way through a graph, which reads them where they lie.
  struct Rows {
    std::vector<float> embeds;                        // [count, width]
    std::vector<std::int64_t> places, text, mutual;  // by axis and row; numbers of rows; by row
    std::int64_t count = 0;
  };

  Graph load(const Component& component, int threads) const;
  void allocate_cache(const Component& decoder);
  Buffer allocate(const std::string& name, const std::vector<std::int64_t>& shape,
                  const std::string& dtype) const;
  void make_weights(int threads);
  Ort::IoBinding bind_decoder();
  Ort::IoBinding bind_cache(Graph& graph);
  void run_rows(Graph& graph, Ort::IoBinding& binding, Rows& rows);
  void run(Graph& graph, Ort::IoBinding& binding);
  void require_room(std::int64_t rows) const;
  void tell_past();
  void count_rows(const std::vector<bool>& is_visual);
  Ort::Value whole_numbers(std::vector<std::int64_t>& numbers, std::vector<std::int64_t> shape);
  Ort::Value floats(std::vector<float>& numbers, std::vector<std::int64_t> shape);

  const Bundle& bundle_;
  int threads_;
  std::int64_t capacity_, length_ = 0, width_ = 0;
  Ort::MemoryInfo memory_;
  Graph vision_, embedding_, decoder_, prefill_;
  std::vector<Buffer> cache_, made_;
  std::int64_t least_prefill_rows_ = 0;  // 0 where there is no such graph
  std::vector<std::vector<bool>> counts_;  // by drop and row of the cache: whether it is left
  std::vector<std::pair<std::int64_t, std::int64_t>> ranked_;  // from a visual row to its call's end
  std::size_t axes_ = 1;
  // Bound once: what a step reads and writes.
  std::vector<std::int64_t> token_{0}, past_length_{0}, past_stage_lengths_, single_row_{0},
      alone_{-1}, position_;
  std::vector<float> embeds_, logits_;
  Ort::IoBinding embed_step_{nullptr}, decode_step_{nullptr}, decode_rows_{nullptr},
      prefill_rows_{nullptr};
};

}  // namespace pocketvlm
