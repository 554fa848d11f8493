// The pictures that networks take, made of a frame in the GPU's memory: its parts, resized, and their mirror images.
//
// The arithmetic is that of edge/imaging.py, thus OpenCV's for 8-bit pictures: a tap's weight is so many 2048ths, a
// mean is of float32. One thread makes one pixel. Grid: (ceil(width / block.x), ceil(height / block.y), pictures).
//
// table: int32 (n, 8), per picture x1 y1 x2 y2 px of the frame, left top width height px of the picture: what of the
// frame lies where; at least one pixel each, inside frame and picture (edge/placement.py).
//
// The _rn functions keep the compiler from joining a product and a sum, which rounds otherwise. Where it may join them,
// in `taps`, a weight changes by a 2048th at most.

typedef unsigned char Byte;

#define LINEAR 0  // mode; the other is area and cubic
#define ONE 2048  // a weight of 1

struct Part {  // of the frame
    const Byte* pixels;  // its first
    long long row;       // bytes from one row to the next
    int width, height;
};

// Where the middle of pixel `to` of `many` lies among `length` pixels of the same extent: floor, and the rest in 0..1.
__device__ int place(int to, int many, int length, float* rest) {
    int above = (2 * to + 1) * length - many, below = 2 * many;
    int whole = above >= 0 ? above / below : -1;  // length >= 1, hence above > -below
    float exact = __fdiv_rn((float)(above - whole * below), (float)below);
    *rest = __fsub_rn(__fadd_rn((float)whole, exact), (float)whole);  // no more exact than a float32 of the place is
    return whole;
}

__device__ int clamped(int value, int length) { return min(max(value, 0), length - 1); }

__device__ Byte grey(float level) { return (Byte)min(max(__float2int_rn(level), 0), 255); }

__device__ int weight(float share) { return __float2int_rn(__fmul_rn(share, (float)ONE)); }

// Bilinear, without an average where it shrinks.
__device__ void linear(const Part& part, int x, int y, int width, int height, Byte* out) {
    float across, down;
    int left = place(x, width, part.width, &across), top = place(y, height, part.height, &down);
    int wx1 = weight(across), wx0 = weight(__fsub_rn(1.0f, across));
    int wy1 = weight(down), wy0 = weight(__fsub_rn(1.0f, down));
    const Byte* rows[2] = {part.pixels + clamped(top, part.height) * part.row,
                           part.pixels + clamped(top + 1, part.height) * part.row};
    int x0 = 3 * clamped(left, part.width), x1 = 3 * clamped(left + 1, part.width);
    for (int c = 0; c < 3; c++) {
        int above = rows[0][x0 + c] * wx0 + rows[0][x1 + c] * wx1;
        int below = rows[1][x0 + c] * wx0 + rows[1][x1 + c] * wx1;
        out[c] = (Byte)(((wy0 * (above >> 4) >> 16) + (wy1 * (below >> 4) >> 16) + 2) >> 2);
    }
}

// The weight of `pixel` in cell `to`, where `length` pixels are averaged into `many` cells; 0 for a sliver.
__device__ float share(int pixel, int to, int many, int length) {
    int start = max(to * length, pixel * many), end = min((to + 1) * length, (pixel + 1) * many);
    return (end - start) * 1000 > many ? __fdiv_rn((float)(end - start), (float)length) : 0.0f;
}

// The mean of the pixels that lie in cell (x, y) of width x height, none of which is larger than the part.
__device__ void mean(const Part& part, int x, int y, int width, int height, Byte* out) {
    if (part.width == width && part.height == height) {  // as the taps of a cubic are where both sides grow
        for (int c = 0; c < 3; c++) out[c] = part.pixels[y * part.row + 3 * x + c];
        return;
    }
    int x1 = x * part.width / width, x2 = ((x + 1) * part.width - 1) / width;
    int y1 = y * part.height / height, y2 = ((y + 1) * part.height - 1) / height;
    if (part.width % width == 0 && part.height % height == 0) {
        int sums[3] = {0, 0, 0}, count = (x2 - x1 + 1) * (y2 - y1 + 1);
        for (int j = y1; j <= y2; j++)
            for (int i = x1; i <= x2; i++)
                for (int c = 0; c < 3; c++) sums[c] += part.pixels[j * part.row + 3 * i + c];
        bool four = x2 - x1 == 1 && y2 - y1 == 1;
        for (int c = 0; c < 3; c++)
            out[c] = four ? (sums[c] + 2) >> 2 : grey(__fmul_rn((float)sums[c], __fdiv_rn(1.0f, (float)count)));
        return;
    }
    float sums[3] = {0.0f, 0.0f, 0.0f};
    for (int j = y1; j <= y2; j++) {
        float row[3] = {0.0f, 0.0f, 0.0f}, down = share(j, y, height, part.height);
        for (int i = x1; i <= x2; i++) {
            float across = share(i, x, width, part.width);
            for (int c = 0; c < 3; c++)
                row[c] = __fadd_rn(row[c], __fmul_rn((float)part.pixels[j * part.row + 3 * i + c], across));
        }
        for (int c = 0; c < 3; c++) sums[c] = __fadd_rn(sums[c], __fmul_rn(row[c], down));
    }
    for (int c = 0; c < 3; c++) out[c] = grey(sums[c]);
}

// Weights of the four taps around a place: cubic convolution (Keys 1981) with the slope that OpenCV and PyTorch take.
__device__ void taps(float rest, int* weights) {
    const float a = -0.75f;
    float total = 0.0f;
    for (int k = 0; k < 3; k++) {
        float t = fabsf(__fsub_rn(rest, (float)(k - 1)));
        float w = t < 1.0f || k > 0 ? ((a + 2) * t - (a + 3)) * t * t + 1 : ((a * t - 5 * a) * t + 8 * a) * t - 4 * a;
        total += w;
        weights[k] = weight(w);
    }
    weights[3] = weight(1.0f - total);
}

// The mean along a side that shrinks, in grey levels, and bicubic along one that grows.
__device__ void cubic(const Part& part, int x, int y, int width, int height, Byte* out) {
    int across = min(width, part.width), down = min(height, part.height);  // of the averaged picture
    if (across == width && down == height) return mean(part, x, y, width, height, out);
    float rest;
    int wx[4], wy[4];
    int left = place(x, width, across, &rest) - 1;
    taps(rest, wx);
    int top = place(y, height, down, &rest) - 1;
    taps(rest, wy);
    int sums[3] = {0, 0, 0};
    for (int j = 0; j < 4; j++) {
        if (wy[j] == 0) continue;  // of the four, one counts along a side that does not grow
        int row[3] = {0, 0, 0};
        for (int i = 0; i < 4; i++) {
            if (wx[i] == 0) continue;
            Byte pixel[3];
            mean(part, clamped(left + i, across), clamped(top + j, down), across, down, pixel);
            for (int c = 0; c < 3; c++) row[c] += pixel[c] * wx[i];
        }
        for (int c = 0; c < 3; c++) sums[c] += row[c] * wy[j];
    }
    for (int c = 0; c < 3; c++) out[c] = grey(__fmul_rn((float)sums[c], 1.0f / (ONE * ONE)));
}

// frame: (frame_height, frame_width, 3) BGR. pictures: (n, height, width, 3), made here. fill: the colour around a
// target, blue | green << 8 | red << 16.
extern "C" __global__ void resize_boxes(const Byte* frame, int frame_width, const int* table, Byte* pictures, int width,
                                        int height, int fill, int mode) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;
    const int* row = table + 8 * blockIdx.z;
    Byte* out = pictures + 3 * (((long long)blockIdx.z * height + y) * width + x);
    int in_x = x - row[4], in_y = y - row[5];
    if (in_x < 0 || in_y < 0 || in_x >= row[6] || in_y >= row[7]) {
        for (int c = 0; c < 3; c++) out[c] = (Byte)(fill >> 8 * c);
        return;
    }
    long long bytes = 3LL * frame_width;
    Part part = {frame + row[1] * bytes + 3 * row[0], bytes, row[2] - row[0], row[3] - row[1]};
    if (mode == LINEAR)
        linear(part, in_x, in_y, row[6], row[7], out);
    else
        cubic(part, in_x, in_y, row[6], row[7], out);
}

// pictures, mirrored: (n, height, width, 3), not one and the same.
extern "C" __global__ void mirror(const Byte* pictures, Byte* mirrored, int width, int height) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;
    long long row = ((long long)blockIdx.z * height + y) * width;
    for (int c = 0; c < 3; c++) mirrored[3 * (row + x) + c] = pictures[3 * (row + width - 1 - x) + c];
}
