// Zeros that take no memory until they are written to.
#pragma once

#include <cstddef>
#include <memory>

namespace pocketvlm {

struct ReturnedPages {
  std::size_t bytes = 0;
  void operator()(void* pages) const;
};

using FreshMemory = std::unique_ptr<void, ReturnedPages>;

// Separate pages, which the system gives as they are written to; null where it refuses.
FreshMemory fresh_zeros(std::size_t bytes);

}  // namespace pocketvlm
