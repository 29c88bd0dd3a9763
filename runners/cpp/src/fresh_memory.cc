#include "fresh_memory.h"

#ifdef _WIN32
#include <cstdlib>
#else
#include <sys/mman.h>
#endif

namespace pocketvlm {

#ifdef _WIN32

void ReturnedPages::operator()(void* pages) const { std::free(pages); }

FreshMemory fresh_zeros(std::size_t bytes) { return {std::calloc(bytes, 1), ReturnedPages{bytes}}; }

#else

void ReturnedPages::operator()(void* pages) const { munmap(pages, bytes); }

// Not calloc: once glibc has freed a large block, it takes smaller ones from its heap, and clears
// what had been in use, so that a cache is resident before a row is in it.
FreshMemory fresh_zeros(std::size_t bytes) {
  void* pages =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return {pages == MAP_FAILED ? nullptr : pages, ReturnedPages{bytes}};
}

#endif

}  // namespace pocketvlm
