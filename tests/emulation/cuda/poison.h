// Fills shared memory with NaN before every block, so that reading what nobody wrote shows in the results.
//
// For executables, with -DEMULATION_POISON. __shared__ is then thread-local: that is what makes it one piece of memory
// which can be found. (A section of its own cannot be: GCC ignores the attribute in templates.) It is all of the
// executable's thread-local memory, so let it have no other. Not under AddressSanitizer, which puts red zones around
// statics alone.
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
