package main

import (
	"math/bits"
	"time"
)

// subBuckets is how many buckets share one power of two: a quantile is at most
// one part in subBuckets above the truth.
const (
	subBucketBits = 4
	subBuckets    = 1 << subBucketBits
)

// latencies counts durations in buckets that grow with the duration. A microsecond and a
// minute have the same relative precision, and a million samples take no more memory than
// one. It is not for concurrent use: each worker has its own, and they are added up at
// the end.
type latencies struct {
	count   uint64
	largest time.Duration
	buckets [(64 - subBucketBits + 1) * subBuckets]uint32
}

// bucketOf is exact below 2*subBuckets nanoseconds; above, it keeps the
// leading subBucketBits+1 bits.
func bucketOf(d time.Duration) int {
	v := uint64(max(0, d))
	shift := max(0, bits.Len64(v)-subBucketBits-1)
	return shift*subBuckets + int(v>>shift)
}

// upperBound is the largest duration that bucketOf puts into bucket i.
func upperBound(i int) time.Duration {
	if i < 2*subBuckets {
		return time.Duration(i)
	}
	shift := i/subBuckets - 1
	return time.Duration(uint64(i%subBuckets+subBuckets+1)<<shift - 1)
}

func (l *latencies) add(d time.Duration) {
	l.count++
	l.largest = max(l.largest, d)
	l.buckets[bucketOf(d)]++
}

func (l *latencies) merge(o *latencies) {
	l.count += o.count
	l.largest = max(l.largest, o.largest)
	for i, n := range o.buckets {
		l.buckets[i] += n
	}
}

// quantile is the duration that the share q of all samples does not exceed,
// and 0 without samples.
func (l *latencies) quantile(q float64) time.Duration {
	rank := max(1, uint64(q*float64(l.count)+0.5))
	var seen uint64
	for i, n := range l.buckets {
		if seen += uint64(n); seen >= rank {
			return min(upperBound(i), l.largest)
		}
	}
	return l.largest
}
