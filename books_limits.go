package connpool

// The limits of one address: those of the pool for every address, or its own.
//
// Config.LimitsFor, which gives an address its own limits, is foreign code, so it runs
// without Pool.mu. A borrower that finds no answer in the books of its address, or one from
// before the last SetLimits, leaves the lock, asks, and comes back with the answer, which
// the books take over (obeyLocked). A version tells whether an answer is from before the
// last SetLimits:
//
//	asked -> in force   the answer is the newest that the address has
//	asked -> dropped    another borrower brought an answer that is as new, or newer
//
// An example: version is 1, and the books of A have an answer of version 1. SetLimits sets
// the version to 2. A borrower of A asks again. While LimitsFor runs, another SetLimits
// sets the version to 3: the borrower asks once more, and its answer is of version 3.

// ownLimits are the limits that LimitsFor gave an address.
type ownLimits struct {
	given   AddrLimits // the answer of LimitsFor
	version uint64     // limitsVersion when LimitsFor was asked
	inForce AddrLimits // given, with the limits of the pool where given has none; less while version is not limitsVersion, see renewLimitsLocked
}

// maxAsked is how often one borrow asks LimitsFor. Then its last answer counts, although
// SetLimits was called meanwhile: a LimitsFor that calls SetLimits would be asked for ever.
const maxAsked = 3

// setLimitsLocked makes resolved the limits of the pool. given is resolved as the caller
// gave it. The answers of LimitsFor are out of date from now on.
func (b *books) setLimitsLocked(given, resolved Limits) {
	b.given, b.limits, b.perAddr = given, resolved, resolved.perAddr()
	if b.asksLimits {
		b.limitsVersion++
	}
}

// limitsAt is the limits in force for s. Nothing else may read a limit that is one for each
// address.
func (b *books) limitsAt(s *site) *AddrLimits {
	if x := s.prefill; x != nil && x.limits != nil {
		return &x.limits.inForce
	}
	return &b.perAddr
}

// mustAskLocked reports whether the borrower has to ask LimitsFor before it may use s; s is
// nil if the address is not known. own is what the borrower was answered last, nil if it
// was not asked. The version that the next answer will have is then in r.
func (b *books) mustAskLocked(s *site, r *request, own *ownLimits) bool {
	switch {
	case b.closed || b.limitsVersion == 0:
		return false
	case own != nil && (own.version == b.limitsVersion || r.asked >= maxAsked):
		return false
	case s != nil && s.prefill != nil && s.prefill.limits != nil && s.prefill.limits.version == b.limitsVersion:
		return false
	}
	r.version = b.limitsVersion
	return true
}

// obeyLocked makes own the limits of s, unless s has limits that are as new. It reports
// whether it did; the caller then calls admitLocked.
func (b *books) obeyLocked(s *site, own *ownLimits, todo *agenda) bool {
	x := s.prefillLocked()
	if x.limits != nil && x.limits.version >= own.version {
		return false
	}
	was := b.limitsAt(s).MaxOpen
	own.inForce = own.given.within(b.perAddr)
	b.lowered = b.lowered || own.inForce.MaxOpen < was
	x.limits = own
	b.applyLimitsLocked(s)
	b.dropSurplusLocked(s, todo)
	return true
}

// renewLimitsLocked follows a change of the limits of the pool: where LimitsFor has set
// nothing for s, they are those of s. But LimitsFor may have a new answer, which sets a lower
// limit. So until it was asked again, no limit of s rises.
func (b *books) renewLimitsLocked(s *site) {
	if x := s.prefill; x != nil && x.limits != nil {
		own := x.limits
		was := own.inForce
		own.inForce = own.given.within(b.perAddr).atMost(was)
		b.lowered = b.lowered || own.inForce.MaxOpen < was.MaxOpen
	}
	b.applyLimitsLocked(s)
}

// applyLimitsLocked brings what s wants in line with its limits, which have changed.
func (b *books) applyLimitsLocked(s *site) {
	if b.limitsAt(s).MinIdle == 0 && s.prefill != nil {
		s.prefill.reserve, s.prefill.unstable, s.prefill.retryOnce = false, false, false
	}
	b.refuseWarmingsLocked(s)
	b.refreshLocked(s)
}

// limitOfLocked is the value of the limit with this name at s; 0 for "". own says that
// LimitsFor set it.
func (b *books) limitOfLocked(s *site, name string) (limit int, own bool) {
	here, given := b.limitsAt(s), AddrLimits{}
	if s.prefill != nil && s.prefill.limits != nil {
		given = s.prefill.limits.given
	}
	switch name {
	case "MaxOpen":
		return b.limitLocked(), false
	case "MaxPerAddr":
		return here.MaxOpen, given.MaxOpen != 0
	case "MaxDialing":
		return b.limits.MaxDialing, false
	case "MaxDialingPerAddr":
		return here.MaxDialing, given.MaxDialing != 0
	case "MaxIdle":
		return b.limits.MaxIdle, false
	case "MaxIdlePerAddr":
		return here.MaxIdle, given.MaxIdle != 0
	case "MaxWaiters":
		return here.MaxWaiters, given.MaxWaiters != 0
	}
	return 0, false
}

// blameLocked names in e the limit that was in the way at s.
func (b *books) blameLocked(e *Error, s *site, name string) {
	e.LimitName = name
	e.Limit, e.ownLimit = b.limitOfLocked(s, name)
}
