#!/bin/sh
# The protocol by curl, one example after the other; each works as it stands.
#
#   clients/curl.sh FOLDER        saves pictures and answers there
#   URL=http://host:8080 MODEL=sdxl clients/curl.sh FOLDER
#
# A server with a key wants one more header in each: -H 'Authorization: Bearer KEY'
set -eu

URL=${URL:-http://localhost:8080}
MODEL=${MODEL:-sdxl}
OUT=${1:?the folder for the pictures is missing}
mkdir -p "$OUT"

# Pictures come as base64 in a JSON answer. This saves the one of that number, from 0 on: decode ANSWER NUMBER PICTURE
decode() {
    python3 -c 'import base64, json, sys
answer = json.load(open(sys.argv[1], encoding="utf-8"))
open(sys.argv[3], "wb").write(base64.b64decode(answer["outputs"][0]["data"][int(sys.argv[2])]))' "$1" "$2" "$3"
}

# In a binary answer the tensors' bytes follow the JSON, whose length is in a header: json_length HEADERS
json_length() {
    tr -d '\r' <"$1" | awk 'tolower($1) == "inference-header-content-length:" { print $2 }'
}

# --- Is the server alive, is the model ready, what does it take? ---

curl -fsS "$URL/v2/health/live"; echo
curl -fsS "$URL/v2/models/$MODEL/ready"; echo
curl -fsS "$URL/v2"; echo
curl -fsS "$URL/v2/models/$MODEL" -o "$OUT/metadata.json"

# --- JSON in, JSON out ---
# Only the prompt is a must. Numbers and texts go into the parameters; "image" and "seed" come back.

curl -fsS "$URL/v2/models/$MODEL/infer" -H 'Content-Type: application/json' -o "$OUT/json.json" -d '{
    "inputs": [
        {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a red circle on a white background"]}
    ],
    "parameters": {"num_inference_steps": 20, "guidance_scale": 5.0, "seed": 7}
}'
decode "$OUT/json.json" 0 "$OUT/json.png"

# --- JSON in, bytes out ---
# The picture's bytes follow the JSON, behind 4 bytes that hold their number.

curl -fsS "$URL/v2/models/$MODEL/infer" -H 'Content-Type: application/json' \
    -D "$OUT/binary.headers" -o "$OUT/binary.answer" -d '{
    "inputs": [
        {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a red circle on a white background"]}
    ],
    "parameters": {"num_inference_steps": 20, "guidance_scale": 5.0, "seed": 7},
    "outputs": [{"name": "image", "parameters": {"binary_data": true}}]
}'
tail -c "+$(($(json_length "$OUT/binary.headers") + 5))" "$OUT/binary.answer" >"$OUT/binary.png"

# --- A prompt and nothing else ---
# A length of 0 says: no JSON, the body is the prompt. Image and seed come back as bytes; the seed's are the last 8.

curl -fsS "$URL/v2/models/$MODEL/infer" -H 'Inference-Header-Content-Length: 0' \
    -D "$OUT/raw.headers" -o "$OUT/raw.answer" --data-binary 'a blue star on a yellow background'
head -c "$(($(wc -c <"$OUT/raw.answer") - 8))" "$OUT/raw.answer" |
    tail -c "+$(($(json_length "$OUT/raw.headers") + 5))" >"$OUT/raw.png"

# --- A packed body ---

printf '%s' '{
    "inputs": [
        {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a green ring on a black background"]}
    ],
    "parameters": {"num_inference_steps": 20, "seed": 7}
}' | gzip | curl -fsS "$URL/v2/models/$MODEL/infer" -H 'Content-Type: application/json' -H 'Content-Encoding: gzip' \
    -o "$OUT/gzip.json" --data-binary @-
decode "$OUT/gzip.json" 0 "$OUT/gzip.png"

# --- Two prompts ---
# A tensor with as many elements as there are prompts has one for each of them; a parameter holds for all.

curl -fsS "$URL/v2/models/$MODEL/infer" -H 'Content-Type: application/json' -o "$OUT/batch.json" -d '{
    "inputs": [
        {"name": "prompt", "shape": [2], "datatype": "BYTES", "data": [
            "a purple square on a white background", "a large orange cross on a blue background"]},
        {"name": "seed", "shape": [2], "datatype": "INT64", "data": [7, 8]}
    ],
    "parameters": {"num_inference_steps": 20}
}'
decode "$OUT/batch.json" 0 "$OUT/batch-1.png"
decode "$OUT/batch.json" 1 "$OUT/batch-2.png"

# --- From one image to another ---
# An image is a file in base64: PNG, JPEG or WebP. "strength" says how far to go from it.

base64 <"$OUT/json.png" | tr -d '\n' >"$OUT/json.base64"
{
    printf '%s' '{"inputs": [
        {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a blue circle on a white background"]},
        {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["'
    cat "$OUT/json.base64"
    printf '%s' '"]}
    ], "parameters": {"num_inference_steps": 20, "strength": 0.8, "seed": 7}}'
} | curl -fsS "$URL/v2/models/$MODEL/infer" -H 'Content-Type: application/json' -o "$OUT/image.json" --data-binary @-
decode "$OUT/image.json" 0 "$OUT/image.png"

# --- Part of an image, painted again ---
# The same without base64: the image's bytes follow the JSON. The mask has one number for each pixel of a coarse picture,
# white (255) where to paint; it is resized.

size=$(wc -c <"$OUT/json.png" | tr -d ' ')
json='{"inputs": [
    {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a blue circle on a white background"]},
    {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": '$((size + 4))'}},
    {"name": "mask_image", "shape": [2, 2], "datatype": "UINT8", "data": [255, 0, 255, 0]}
], "parameters": {"num_inference_steps": 20, "strength": 0.9, "seed": 7}}'
{
    printf '%s' "$json"
    # An element of BYTES begins with its length, 4 bytes with the lowest first.
    for shift in 0 8 16 24; do
        printf '%b' "\\0$(printf '%o' $((size >> shift & 255)))"
    done
    cat "$OUT/json.png"
} | curl -fsS "$URL/v2/models/$MODEL/infer" -H "Inference-Header-Content-Length: ${#json}" -o "$OUT/inpaint.json" \
    --data-binary @-
decode "$OUT/inpaint.json" 0 "$OUT/inpaint.png"

# --- Protocol v1 ---
# An instance holds the pipeline's keywords. One prediction for each picture; the header X-Seed names their seeds.

curl -fsS "$URL/v1/models/$MODEL:predict" -H 'Content-Type: application/json' -o "$OUT/v1.json" -d '{
    "instances": [
        {"prompt": "a red circle on a white background", "num_inference_steps": 20, "guidance_scale": 5.0, "seed": 7}
    ]
}'
python3 -c 'import base64, json, sys
answer = json.load(open(sys.argv[1], encoding="utf-8"))
open(sys.argv[2], "wb").write(base64.b64decode(answer["predictions"][0]["image"]["b64"]))' "$OUT/v1.json" "$OUT/v1.png"

# --- An error ---
# Every error is {"error": "a sentence"}; without -f curl shows it. This one is 400 and names the right spelling.

curl -sS "$URL/v2/models/$MODEL/infer" -H 'Content-Type: application/json' -o "$OUT/error.json" -w '%{http_code} ' -d '{
    "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a red circle"]}],
    "parameters": {"num_inference_step": 20}
}'
cat "$OUT/error.json"; echo
