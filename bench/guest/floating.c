/* floating WHAT COUNT: floating-point arithmetic.
 *   bodies   five bodies under gravity, double precision: scalar SSE2 with divisions and square roots
 *   matrix   products of single-precision matrices: packed SSE where the compiler sees it
 *   set      points of the Mandelbrot set, double precision: compare and branch
 *   long     Simpson's rule and a Newton iteration in long double: x87 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct body {
    double at[3], speed[3], mass;
};

static double bodies(long count)
{
    static struct body all[5];
    for (int n = 0; n < 5; n++)
        for (int axis = 0; axis < 3; axis++) {
            all[n].at[axis] = n * 3.1 + axis * 0.7 * n;
            all[n].speed[axis] = 0.01 * (axis - n);
            all[n].mass = 1.0 / (n + 1);
        }
    while (count--) {
        for (int n = 0; n < 5; n++)
            for (int other = n + 1; other < 5; other++) {
                double apart[3], square = 1e-9;
                for (int axis = 0; axis < 3; axis++) {
                    apart[axis] = all[n].at[axis] - all[other].at[axis];
                    square += apart[axis] * apart[axis];
                }
                double pull = 0.001 / (square * sqrt(square));
                for (int axis = 0; axis < 3; axis++) {
                    all[n].speed[axis] -= apart[axis] * all[other].mass * pull;
                    all[other].speed[axis] += apart[axis] * all[n].mass * pull;
                }
            }
        for (int n = 0; n < 5; n++)
            for (int axis = 0; axis < 3; axis++)
                all[n].at[axis] += 0.001 * all[n].speed[axis];
    }
    return all[0].at[0];
}

#define SIDE 96

static double matrix(long count)
{
    static float left[SIDE][SIDE], right[SIDE][SIDE], product[SIDE][SIDE];
    for (int row = 0; row < SIDE; row++)
        for (int column = 0; column < SIDE; column++) {
            left[row][column] = (row * 7 + column) % 13 * 0.25f;
            right[row][column] = (row + column * 5) % 11 * 0.125f;
        }
    while (count--) {
        for (int row = 0; row < SIDE; row++) {
            memset(product[row], 0, sizeof product[row]);
            for (int inner = 0; inner < SIDE; inner++) {
                float factor = left[row][inner];
                for (int column = 0; column < SIDE; column++)
                    product[row][column] += factor * right[inner][column];
            }
        }
        left[count % SIDE][0] = product[0][count % SIDE] * 1e-3f;
    }
    return product[1][1];
}

static double set(long count)
{
    long inside = 0;
    while (count--)
        for (int y = 0; y < 64; y++)
            for (int x = 0; x < 64; x++) {
                double cr = x / 32.0 - 1.5, ci = y / 32.0 - 1.0, zr = 0, zi = 0;
                int n = 0;
                while (n < 100 && zr * zr + zi * zi < 4.0) {
                    double next = zr * zr - zi * zi + cr;
                    zi = 2 * zr * zi + ci;
                    zr = next;
                    n++;
                }
                inside += n == 100;
            }
    return (double)inside;
}

static double longs(long count)
{
    long double sum = 0;
    while (count--) {
        const int steps = 400;
        long double width = 1.0L / steps, area = 0;
        for (int n = 0; n <= steps; n++) {
            long double x = n * width;
            long double f = 4.0L / (1.0L + x * x);
            area += f * (n == 0 || n == steps ? 1 : n & 1 ? 4 : 2);
        }
        area *= width / 3;
        long double root = 1;
        for (int n = 0; n < 40; n++)
            root = (root + area / root) / 2;
        sum += root + sqrtl(area);
    }
    return (double)sum;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        double (*run)(long);
    } all[] = {{"bodies", bodies}, {"matrix", matrix}, {"set", set}, {"long", longs}};
    for (size_t n = 0; argc == 3 && n < sizeof all / sizeof *all; n++) {
        if (strcmp(argv[1], all[n].name) == 0) {
            printf("%.9g\n", all[n].run(atol(argv[2])));
            return 0;
        }
    }
    return 2;
}
