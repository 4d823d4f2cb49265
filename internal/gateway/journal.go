package gateway

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// journal passes log lines on to another handler without ever waiting for it. The reader
// of a log may stop reading (a stopped journal, a full pipe, a terminal with Ctrl-S), and
// no request, client or shutdown may wait for it. Lines wait in a queue of bounded
// length. A line that finds the queue full, or that the handler cannot write, is dropped
// and counted.
type journal struct {
	next slog.Handler
	*lines
}

// journalLength is how many lines may wait.
const journalLength = 1024

// lines is the queue and its writer. The writer is a goroutine that exists only while
// there is something to write, so a journal needs no Close.
type lines struct {
	root slog.Handler // gets the lines about dropped lines

	// mu guards the fields below. Nothing is written under it.
	mu      sync.Mutex
	waiting []line
	ended   chan struct{} // closed when the goroutine has ended; nil: there is none
	dropped uint64
	told    uint64 // how many of dropped have been reported
}

type line struct {
	to slog.Handler
	r  slog.Record
}

func newJournal(next slog.Handler) *journal { return &journal{next, &lines{root: next}} }

func (j *journal) Enabled(ctx context.Context, level slog.Level) bool {
	return j.next.Enabled(ctx, level)
}

func (j *journal) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &journal{j.next.WithAttrs(attrs), j.lines}
}

func (j *journal) WithGroup(name string) slog.Handler {
	return &journal{j.next.WithGroup(name), j.lines}
}

// Handle never waits and never fails.
func (j *journal) Handle(_ context.Context, r slog.Record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.waiting) >= journalLength {
		j.dropped++
		return nil
	}
	j.waiting = append(j.waiting, line{j.next, r.Clone()})
	if j.ended == nil {
		j.ended = make(chan struct{})
		go j.write(j.ended)
	}
	return nil
}

// write empties the queue. When the queue is empty, write reports how many lines were
// dropped.
func (l *lines) write(ended chan struct{}) {
	defer close(ended)
	for {
		l.mu.Lock()
		batch := l.waiting
		l.waiting = nil
		news := uint64(0)
		if len(batch) == 0 {
			if news = l.dropped - l.told; news == 0 {
				l.ended = nil
				l.mu.Unlock()
				return
			}
			l.told = l.dropped
		}
		l.mu.Unlock()
		for _, one := range batch {
			if !written(one.to, one.r) {
				l.mu.Lock()
				l.dropped++
				l.mu.Unlock()
			}
		}
		if news > 0 {
			r := slog.NewRecord(time.Now(), slog.LevelWarn, "log lines were dropped, since the log did not take them", 0)
			r.Add("lines", news)
			if l.root.Enabled(context.Background(), r.Level) {
				written(l.root, r) // a line about dropped lines that cannot be written is not counted
			}
		}
	}
}

func written(h slog.Handler, r slog.Record) (ok bool) {
	defer func() { _ = recover() }() // a panic of the log handler ends nothing else
	return h.Handle(context.Background(), r) == nil
}

// flush waits until all lines are written, for d at most, and reports whether they are.
func (l *lines) flush(d time.Duration) bool {
	l.mu.Lock()
	ended := l.ended
	l.mu.Unlock()
	if ended == nil {
		return true
	}
	late := time.NewTimer(d)
	defer late.Stop()
	select {
	case <-ended:
		return true
	case <-late.C:
		return false
	}
}

func (l *lines) droppedSoFar() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dropped
}
