#define DUALDIFF_LEVEL portable
#define DUALDIFF_BITS 128
#include "level.h"

namespace dualdiff::portable {
bool available() { return true; }
}  // namespace dualdiff::portable
