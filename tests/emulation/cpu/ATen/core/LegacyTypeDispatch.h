// In place of torch's header; see ../ATen.h.
#pragma once

namespace at {
struct AutoDispatchBelowADInplaceOrView {
  AutoDispatchBelowADInplaceOrView() {}
};
}  // namespace at
