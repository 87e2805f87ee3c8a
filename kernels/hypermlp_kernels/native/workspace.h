// Parts of one piece of memory. Without memory the parts are counted alone: what a call needs is found by the code that
// takes it. Under AddressSanitizer there is a guarded gap after each part.
#pragma once
#include <cstdlib>
#include <new>
#include <utility>

#include "vectors.h"

#if defined(__SANITIZE_ADDRESS__)
#define GUARDED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GUARDED 1
#endif
#endif
#ifdef GUARDED
extern "C" void __asan_poison_memory_region(void const volatile*, size_t);
extern "C" void __asan_unpoison_memory_region(void const volatile*, size_t);
#endif

namespace hypermlp {

class Workspace {
 public:
  explicit Workspace(void* memory) : base_(static_cast<char*>(memory)) {}
#ifdef GUARDED
  ~Workspace() {
    if (base_) __asan_unpoison_memory_region(base_, used_);
  }
#endif
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // `count` reals on a cache line of their own, after `before` more that may be read and written too
  real* take(long count, long before = 0) {
    char* part = base_ ? base_ + used_ : nullptr;
    used_ += round_up((count + before) * sizeof(real), LINE);
    guard();
    return part ? reinterpret_cast<real*>(part) + before : nullptr;
  }
  long used() const { return used_; }

 private:
  static constexpr long LINE = 64;

  void guard() {
#ifdef GUARDED
    if (base_) __asan_poison_memory_region(base_ + used_, 4 * LINE);
    used_ += 4 * LINE;
#endif
  }

  char* base_;
  long used_ = 0;
};

// a fixed number of objects, made one by one; plain malloc, since the C++ library is not linked
template <class T>
class Array {
 public:
  explicit Array(long capacity) : data_(static_cast<T*>(std::malloc(sizeof(T) * (capacity ? capacity : 1)))) {}
  ~Array() {
    for (long i = 0; i < count_; ++i) data_[i].~T();
    std::free(data_);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  template <class... Arguments>
  void add(Arguments&&... arguments) {
    new (data_ + count_++) T(std::forward<Arguments>(arguments)...);
  }
  T& operator[](long i) { return data_[i]; }
  const T* data() const { return data_; }
  long count() const { return count_; }

 private:
  T* data_;
  long count_ = 0;
};

}  // namespace hypermlp
