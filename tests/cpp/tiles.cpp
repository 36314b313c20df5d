// csrc/cuda/tiles.h on the CPU: every cell of a triangle and every step of a sum is taken exactly once.
#include "cuda/tiles.h"

#include <vector>

#include "test.h"

using namespace kore;

namespace {

void triangle(int size, int group) {
    std::vector<int> seen(size * size);
    for (int index = 0; index < size * (size + 1) / 2; ++index) {
        const Tile tile = tile_of_triangle(index, size, group);
        const bool inside = 0 <= tile.column && tile.column <= tile.row && tile.row < size;
        CHECK(inside, "size %d group %d index %d: (%d, %d)", size, group, index, tile.row, tile.column);
        if (inside) ++seen[tile.row * size + tile.column];
    }
    for (int i = 0; i < size; ++i)
        for (int j = 0; j <= i; ++j) CHECK(seen[i * size + j] == 1, "size %d (%d, %d)", size, i, j);
}

void schedule(int tiles, int blocks, int clusters) {
    const Schedule plan = cut_last_wave(tiles, blocks, clusters);
    std::vector<int> seen(tiles * blocks);
    for (int item = 0; item < plan.items(); ++item)
        for (int step = 0; step < plan.count(item); ++step) {
            const int at = plan.tile(item) * blocks + plan.first_block(item) + step;
            CHECK(0 <= at && at < tiles * blocks, "item %d", item);
            if (0 <= at && at < tiles * blocks) ++seen[at];
        }
    for (int count : seen) CHECK(count == 1, "%d tiles, %d blocks, %d clusters", tiles, blocks, clusters);
}

}  // namespace

int main() {
    for (int size : {1, 2, 3, 7, 16, 43})
        for (int group : {1, 3, 4, 8}) triangle(size, group);
    for (int tiles : {1, 10, 66, 136})
        for (int blocks : {1, 2, 33, 64})
            for (int clusters : {1, 4, 66}) schedule(tiles, blocks, clusters);
    return test::finish("tiles");
}
