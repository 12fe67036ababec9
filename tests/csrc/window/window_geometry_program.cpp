// Prints what csrc/window/window_geometry.h says of a map: six numbers on each line of the input, as the arguments of
// make_geometry, and on each line of the output: per window the sources of its tokens, then the sides of the seam they
// came from, then whether it crosses the seam; at last the bias rows of all pairs of tokens.
#include <cstdio>

#include "window/window_geometry.h"

int main() {
  using namespace swin_moe;
  long long height, width;
  int window_h, window_w, shift_h, shift_w;
  while (std::scanf("%lld %lld %d %d %d %d", &height, &width, &window_h, &window_w, &shift_h, &shift_w) == 6) {
    const WindowGeometry g = make_geometry(height, width, window_h, window_w, shift_h, shift_w);
    for (int64_t window = 0; window < g.windows(); ++window) {
      for (int token = 0; token < g.tokens(); ++token) std::printf("%lld ", (long long)source_token(g, window, token));
      for (int token = 0; token < g.tokens(); ++token) std::printf("%d ", seam_side(g, window, token));
      std::printf("%d ", crosses_seam(g, window));
    }
    for (int query = 0; query < g.tokens(); ++query)
      for (int key = 0; key < g.tokens(); ++key) std::printf("%d ", bias_row(g, query, key));
    std::printf("\n");
  }
}
