// Fills shared memory with NaN before every block, so that reads of unwritten elements show in the results.
//
// For executables, with -DEMULATION_POISON. __shared__ variables are then thread-local, which puts them into one
// segment that can be found. (GCC ignores the attribute for a named section in templates.) The whole segment is
// overwritten, so the executable must have no other thread-local variables. Not under AddressSanitizer, which puts red
// zones around plain statics only.
#pragma once

#if defined(EMULATION_POISON) && !defined(EMULATION_THREADS) && !defined(__SANITIZE_ADDRESS__)
#define __shared__ static thread_local

#include <link.h>

#include <cstring>

namespace emulation {
__attribute__((no_sanitize("thread"))) inline void poison_shared_memory() {
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void*) {
        for (int q = 0; q < module->dlpi_phnum; q++)
          if (module->dlpi_phdr[q].p_type == PT_TLS && module->dlpi_tls_data)
            std::memset(module->dlpi_tls_data, 0xff, module->dlpi_phdr[q].p_memsz);
        return 1;  // the executable comes first
      },
      nullptr);
}
}  // namespace emulation
#else
#define __shared__ static

namespace emulation {
inline void poison_shared_memory() {}
}  // namespace emulation
#endif
