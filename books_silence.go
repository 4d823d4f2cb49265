package connpool

import "time"

// An address that swallows packets holds up nobody else. What is scarce (slots,
// dials under way) is shared by how long it is waited for, but for addresses that
// have not answered, by how much they have of it already:
//
//   - The rank of an address is 0 if it has answered, else the number of its dials
//     under way. What is free goes to the lowest rank first (siteHeap).
//   - If nothing is free, an address whose dials have been silent for a while
//     gives up one of them to an address that has at least two fewer. It is as if
//     that dial had not been started: its waiter waits for the next.
//   - A dial for nobody who waits, a reserve's or Warm's, is given up before that, as
//     soon as it has been silent for a while; where nobody may wait (Fail), at once.
//   - Only then idle connections make room, and for rank 0 only: for addresses
//     that have answered, and for the first dial to any other.
//
// So none of this slows down an address that is alone.

// silence is how long a dial may go without an answer before its address has to
// share with others.
const silence = 50 * time.Millisecond

// known reports whether s has answered, as far as its books go back.
func (s *site) known() bool {
	return !s.queue.silent && !s.failing() && (s.queue.answered || s.n[phaseIdle]+s.n[phaseBorrowed] > 0)
}

// eager is how many of the dials that s wants idle connections make room for.
func (s *site) eager() int {
	switch {
	case s.rank > 0:
		return 0
	case s.queue.first:
		return min(int(s.want), 1)
	}
	return int(s.want)
}

// rankLocked brings the rank of s up to date. It is a part of refreshLocked.
func (b *books) rankLocked(s *site) {
	was := s.rank
	if s.rank = 0; !s.known() {
		s.rank = int8(min(s.queue.dials, 1<<7-1))
	}
	if s.queue != &noQueue {
		s.queue.first = s.rank == 0 && !s.known()
	}
	switch {
	case (s.rank > 1) == (was > 1):
	case s.rank <= 1:
		delete(b.unheard, s)
	case b.unheard == nil:
		b.unheard = map[*site]struct{}{s: {}}
	default:
		b.unheard[s] = struct{}{}
	}
}

// noteAnsweredLocked books that a dial to s has ended well.
func (s *site) noteAnsweredLocked() {
	if s.queue != &noQueue {
		s.queue.answered, s.queue.silent = true, false
		s.queue.answers++
	}
}

// shareLocked makes room for the first in line, whom no limit of its own holds
// up, and reports whether it could. A burst of dials is left alone until it has
// been silent for a while, unless something idle had to go for the first dial to
// another address that has not answered either.
func (b *books) shareLocked(todo *agenda) (shared bool) {
	need := b.nextLocked()
	if b.whenFull == FullOverflow && b.roomLocked() <= 0 {
		if len(b.ready) == 0 {
			return false // DialContext may not exceed MaxOpen: a dial less is no help
		}
		need = b.ready[0]
	}
	atOnce := b.n[phaseIdle] > 0 && !need.known()
	fail := b.whenFull == FullFail && b.roomLocked() <= 0
	for b.displaced < int(need.want) {
		if a := b.unneededLocked(fail); a != nil {
			b.displaceLocked(a, todo)
			shared = true
			continue
		}
		var rich *site
		for s := range b.unheard {
			if (atOnce || s.queue.silent) && (rich == nil || s.rank > rich.rank) {
				rich = s
			}
		}
		if rich == nil || rich == need || int(rich.rank) <= int(need.rank)+b.displaced+1 {
			break
		}
		b.displaceLocked(rich.dial, todo)
		shared = true
	}
	return shared
}

// unneededLocked is a dial for nobody who waits that may be broken off, nil if there
// is none.
func (b *books) unneededLocked(atOnce bool) *attempt {
	for s := range b.unneeded {
		for a := s.dial; a != nil; a = a.older {
			if a.prefill && (a.quiet || atOnce) {
				return a
			}
		}
	}
	return nil
}

// noteUnneededLocked brings Pool.unneeded up to date. It is a part of refreshLocked.
func (b *books) noteUnneededLocked(s *site) {
	switch yes := s.prefill.dials > 0 && s.queue.dials > s.queue.len; {
	case !yes:
		delete(b.unneeded, s)
	case b.unneeded == nil:
		b.unneeded = map[*site]struct{}{s: {}}
	default:
		b.unneeded[s] = struct{}{}
	}
}

// displaceLocked breaks a off, which waiters may count on.
func (b *books) displaceLocked(a *attempt, todo *agenda) {
	s := a.c.site
	s.dropLocked(a)
	s.queue.dialEnded()
	a.surplus, a.displaced = true, true
	b.displaced++
	if a.prefill {
		a.prefill = false
		s.prefill.dials--
		if a.warm == nil && a.quiet {
			s.prefill.unstable = true // or it would be tried again whenever there is room
		}
	}
	if a.warm != nil {
		a.warm.own--
		a.warm = nil
	}
	if a.giveUp != nil {
		todo.cancels = append(todo.cancels, a.giveUp)
	}
	b.refreshLocked(s)
}
