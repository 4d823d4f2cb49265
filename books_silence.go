package connpool

import "time"

// An address that swallows packets must not hold up other addresses. Slots and the dials
// under way are scarce. Addresses share them by the age of their waiters. But an address
// that has not answered has less right to them the more of them it has:
//
//   - The rank of an address is 0 if the address has answered, else the number of its
//     dials under way. What is free goes to the lowest rank first (siteHeap).
//   - If nothing is free, an address whose dials have been silent for 50 ms gives up one
//     dial to an address that has at least two fewer. The effect is as if that dial had
//     not been started: its waiter waits for the next dial.
//   - A dial for which nobody waits (for a reserve or a Warm) is given up before that, as
//     soon as it has been silent for 50 ms; where nobody may wait (FullFail), at once.
//   - Only then idle connections make room, and only for rank 0: for addresses that have
//     answered, and for the first dial to any other address.
//
// So none of these rules slows down an address that is alone.
//
// An example: MaxDialing and MaxDialingPerAddr are 8. A has not answered and has 8 dials
// under way, rank 8. B, which is new, wants 2 dials, rank 0. After 50 ms of silence A
// gives up two dials to B. Then A has rank 6, and B, with 2 dials under way and no
// answer yet, has rank 2.

// silence is how long a dial may be without an answer before its address has to share
// with other addresses.
const silence = 50 * time.Millisecond

// known reports whether s has answered, as far as the pool remembers.
func (s *site) known() bool {
	return !s.queue.silent && !s.failing() && (s.queue.answered || s.n[phaseIdle]+s.n[phaseBorrowed] > 0)
}

// eager is how many of the dials that s wants may evict idle connections.
func (s *site) eager() int {
	switch {
	case s.rank > 0:
		return 0
	case s.queue.first:
		return min(int(s.want), 1)
	}
	return int(s.want)
}

// rankLocked recomputes the rank of s. It is a part of refreshLocked.
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

// noteAnsweredLocked records that a dial to s has succeeded.
func (s *site) noteAnsweredLocked() {
	if s.queue != &noQueue {
		s.queue.answered, s.queue.silent = true, false
		s.queue.answers++
	}
}

// shareLocked takes slots from addresses that have not answered, for the site that gets the
// next slot and that no limit of its own holds up. It reports whether it took any. A burst
// of dials is left alone until it has been silent for `silence`. The exception: while there
// are idle connections and the site that needs the slot has not answered either, the burst
// makes room at once, before an idle connection has to.
func (b *books) shareLocked(todo *agenda) (shared bool) {
	need := b.nextLocked()
	if b.whenFull == FullOverflow && b.roomLocked() <= 0 {
		if len(b.ready) == 0 {
			return false // only DialContext waits, which may not exceed MaxOpen: one dial less is no help
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

// unneededLocked is a dial for which nobody waits and that may be broken off; nil if there
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

// noteUnneededLocked brings books.unneeded up to date. It is a part of refreshLocked.
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

// displaceLocked breaks off a, a dial that waiters may count on, for another address.
func (b *books) displaceLocked(a *attempt, todo *agenda) {
	s := a.c.site
	s.dropLocked(a)
	s.queue.dialEnded()
	if s.queue.dials == 0 {
		s.queue.silent = false // as when the last dial ends by itself
	}
	a.surplus, a.displaced = true, true
	b.displaced++
	if a.prefill {
		a.prefill = false
		s.prefill.dials--
		if a.warm == nil && a.quiet {
			s.prefill.unstable = true // else the reserve would try again whenever there is room
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
